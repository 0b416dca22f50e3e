"""The catalogue of bad input: every kind there is, and the inputs of that kind that tests hold to what is promised.

A kind's proofs are rows of test_bad_*.py, by patterns of their names, and tests, by file and name; what is left to say
stands behind them. Numbers are stable; one that is missing was merged into another. To run all of it, and to count:

    python tests/robustness/test_catalogue.py > proofs.txt && pytest @proofs.txt
"""

from __future__ import annotations

import ast
import importlib.util
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent


class Kind(NamedTuple):
    """What is passed; proofs; and what is not covered, with the reason."""

    what: str
    proofs: tuple[str, ...]
    reason: str = ""


def kind(what: str, *proofs: str, reason: str = "") -> Kind:
    return Kind(what, proofs, reason)


LOAD, FAMILIES, SURVEY = "weights/test_load.py::", "weights/test_families.py::", "weights/test_survey.py::"
HEADER, INSPECT, EMA = "files/test_header.py::", "weights/test_inspect.py::", "weights/test_ema.py::"
IMAGE, CLI = "files/test_picture.py::", "app/test_cli.py::"
WHOLE, WORK = "robustness/test_whole_files.py::", "robustness/test_failing_work.py::"
ENGINE, RUNNER, PIPELINE = "engine/test_loop.py::", "engine/test_runner.py::", "test_pipeline.py::"
NETWORKS, OPENING, WRITE = "engine/test_networks.py::", "files/test_opening.py::", "files/test_write.py::"

CATALOGUE: dict[int, Kind] = {
    1: kind("an empty file", "*: empty", "header: in a process"),
    2: kind("data cut short", "*: cut short", "header: header cut short", "folder: truncated weights",
            f"{HEADER}test_cut_and_lengthened_files_are_always_refused"),
    3: kind("bytes behind the end", "header: bytes behind"),
    4: kind("a header of 2^63 bytes", "header: length 2^63"),
    5: kind("a header of 101 MB", "header: length 101 MB", "header: header of 17 MB"),
    6: kind("a header past the end", "header: length past the end"),
    7: kind("overlapping tensors", "*: overlap"),
    8: kind("a hole between tensors", "*: hole", "inversion: in a process"),
    9: kind("a name twice", "*: twice", "header: twice the same", "header: leading space"),
    12: kind("negative numbers", "header: negative *"),
    13: kind("shape x dtype overflows", "header: overflow"),
    14: kind("shape against offsets", "header: shape against offsets"),
    15: kind("an unknown dtype", "header: unknown dtype"),
    16: kind("a header that is no UTF-8, no JSON, no object", "header: not *", "header: a list", "header: nested",
             "header: half a character", "header: name that moves the cursor", f"{HEADER}test_random_bytes",
             f"{HEADER}test_changed_bytes", f"{HEADER}test_random_headers",
             f"{HEADER}test_refuses_in_one_line_with_the_reason"),
    18: kind("metadata that is no string", "header: metadata number"),
    19: kind("no tensors", "header: no tensors"),
    21: kind("scalars and empty tensors", "header: scalar", f"{SURVEY}test_prediction_type_of_a_single_file",
             f"{HEADER}test_padding_scalars_and_empty_tensors_are_part_of_the_format"),
    22: kind("NaN or infinity in weights", "folder: nan *", "folder: infinity *", "folder: weights that overflow",
             f"{LOAD}test_nan_in_float8_is_found",
             reason="The first 64 KiB of every tensor are looked at before loading, the rest when it is used."),
    23: kind("all-zero weights", f"{LOAD}test_full_size_ldm_file"),
    24: kind("a git-lfs pointer", "*: lfs pointer", "folder: config is an lfs pointer"),
    25: kind("an error page", "*: html", "header: json error"),
    26: kind("a pickle by another name", "header: pickle*", "inversion: pickle", "image: a checkpoint as picture"),
    27: kind("a .ckpt, .pt, .pth, .bin", "header: .*"),
    28: kind("a pickle that runs code", "header: pickle that would run code",
             "test_house.py::test_nothing_can_run_a_pickle_or_load_half_a_model"),
    29: kind("a folder in place of a file", "checkpoint: folder named as a file", "checkpoint: vae is an empty folder",
             "folder: empty", "folder: of pictures", "image: folder", "output: is a folder"),
    30: kind("a folder that lacks a part", "folder: no *", "folder: xl without its second text encoder",
             f"{FAMILIES}test_faulty_folders_of_sdxl"),
    31: kind("a folder of pickles", "folder: pickles only"),
    32: kind("several variants in a folder", f"{LOAD}test_variants_in_the_documented_order", f"{LOAD}test_shards"),
    34: kind("what cannot be read", "checkpoint: missing*", "checkpoint: * of 100 kB", "checkpoint: dangling",
             "checkpoint: *below a file", "checkpoint: device", "checkpoint: null byte", "checkpoint: inspect missing",
             "robustness/test_bad_checkpoints.py::test_a_file_without_the_right_to_read",
             f"{HEADER}test_refuses_what_is_no_file", "image: missing", "image: dangling link", "image: link to itself",
             "image: below a file", "image: pipe", "image: device"),
    35: kind("a LoRA as the checkpoint", "checkpoint: lora*", f"{INSPECT}test_generated_listings"),
    36: kind("a VAE as the checkpoint", "checkpoint: vae only", "checkpoint: text only"),
    37: kind("a UNet alone", "checkpoint: unet only", f"{SURVEY}test_missing_parts_are_supplied_from_files"),
    38: kind("a UNet alone, bare names", "checkpoint: bare unet"),
    39: kind("a merge without VAE", "checkpoint: no vae", "checkpoint: vae that holds none"),
    41: kind("position_ids absent or damaged", f"{LOAD}test_every_ldm_dialect", f"{LOAD}test_every_folder_dialect"),
    43: kind("averaged and plain weights in one file", f"{EMA}test_the_plain_weights_are_the_default",
             f"{EMA}test_the_average_on_request", f"{EMA}test_a_file_with_nothing_but_the_average",
             f"{EMA}test_an_average_that_is_not_there_or_not_whole", f"{EMA}test_full_size_through_the_public_door"),
    44: kind("a tensor that is missing", "checkpoint: key missing",
             f"{SURVEY}test_a_faulty_folder_is_refused_in_one_line"),
    45: kind("tensors too many", "checkpoint: extra key in the unet",
             f"{LOAD}test_foreign_tensors_beside_the_parts_are_named", f"{INSPECT}test_numbers_and_notes"),
    46: kind("a wrong shape", "checkpoint: wrong shape", "checkpoint: sd 2 in one layer"),
    47: kind("a transposed weight", "checkpoint: transposed",
             reason="A square weight that was transposed cannot be told from a sound one."),
    48: kind("an inpainting model", "checkpoint: inpainting"),
    49: kind("other models with more channels", "checkpoint: pix2pix", "checkpoint: depth"),
    51: kind("another architecture", "checkpoint: flux", "checkpoint: sd 3", "checkpoint: sdxl refiner",
             "checkpoint: pixart", "checkpoint: wan", "checkpoint: svd", "checkpoint: ip-adapter",
             "checkpoint: controlnet", "checkpoint: textual inversion", "header: nothing known", "header: gguf",
             "inversion: nothing known", f"{FAMILIES}test_what_a_title_says_is_a_warning"),
    52: kind("SD 2, eps or v unsaid", f"{FAMILIES}test_sd2_guesses_where_nothing_says_it",
             f"{FAMILIES}test_a_folder_without_scheduler_config_is_guessed_too",
             f"{FAMILIES}test_what_a_file_says_of_itself_is_believed"),
    53: kind("SD 1.5 that predicts v", f"{SURVEY}test_prediction_type_of_a_folder",
             f"{SURVEY}test_prediction_type_of_a_single_file",
             f"{RUNNER}test_what_is_computed_once_is_what_the_unet_computes",
             reason="Such a merge says so in its metadata or by a marker, or --prediction-type says it."),
    54: kind("v_pred and ztsnr markers", "folder: flow matching",
             f"{SURVEY}test_prediction_type_of_a_single_file"),
    56: kind("float8 weights", "checkpoint: fp8", f"{LOAD}test_float8_is_read_exactly_as_float16",
             f"{LOAD}test_scaled_float8_is_refused_by_name"),
    57: kind("mixed dtypes", f"{LOAD}test_mixed_dtypes_are_kept_with_a_note"),
    58: kind("float64, integers", "checkpoint: integers", f"{LOAD}test_float64_is_cast_with_a_note"),
    59: kind("a big-endian machine", f"{HEADER}test_a_machine_that_reads_numbers_the_other_way_round"),
    60: kind("text encoder names of every version", f"{LOAD}test_the_modules_take_the_weights_strictly",
             "oracle/test_checkpoints.py::test_every_text_encoder_layout_gives_the_same_states",
             "oracle/test_checkpoints.py::test_transformers_reads_the_folder_layouts_as_we_do",
             "oracle/test_checkpoints.py::test_one_swapped_text_tensor_changes_the_states"),
    61: kind("no scheduler config, or another schedule", "folder: schedule unknown", "folder: prediction unknown",
             "folder: all noise", f"{SURVEY}test_no_scheduler_config_means_stable_diffusion_1"),
    62: kind("a config against its weights", "folder: config *", "folder: unknown setting", "folder: wrong block",
             "folder: channels of text for a number", "folder: another vae class", "folder: a million *",
             "folder: a letter for a long text", "folder: defaults unknown"),
    64: kind("code in a folder", "folder: code in a config", f"{LOAD}test_nothing_of_a_checkpoint_is_imported",
             "app/test_sealed.py::test_edits_and_looks_touch_nothing"),
    65: kind("no tokenizer", "checkpoint: missing tokenizer", "folder: tokenizer *",
             "weights/test_clip_bpe.py::test_known_prompts", f"{SURVEY}test_tokenizer_folders"),
    66: kind("a tokenizer without a length",
             f"{NETWORKS}test_a_prompt_has_the_text_encoders_length_whatever_the_tokenizer_says"),
    67: kind("a prompt that is too long", f"{PIPELINE}test_a_prompt_that_is_too_long_names_what_was_dropped",
             reason="It is a warning; there is no option that makes it an error."),
    68: kind("an empty prompt", "test_edit.py::test_both_prompts_empty", "option: --p2p --*",
             f"{FAMILIES}test_zeros_for_the_empty_prompt"),
    71: kind("doubtful and contradictory edits", f"{CLI}test_doubtful_wishes_are_warned_of", "option: --add*",
             "option: --remove*", "option: --masks*", f"{PIPELINE}test_concept_refuses",
             reason="Any number of edits is taken: their predictions are batched as memory allows."),
    72: kind("strengths that are no finite number", "option: --guidance-scale*", "option: --source-guidance-scale*",
             "option: --momentum*", "option: --eta*", "test_config.py::test_numbers_outside"),
    73: kind("numbers of steps", "option: --steps*", "option: --skip*", "option: steps in a process",
             "test_schedule.py::test_too_few_or_too_many_steps_are_refused"),
    74: kind("an empty picture", "image: empty", "image: for invert too"),
    75: kind("no picture at all", "image: text", "image: html", "image: svg", "image: zip", "image: numpy",
             "image: video", "image: url", "header: picture", "inspect: picture"),
    76: kind("a picture cut short", "image: truncated*", "image: only magic",
             f"{IMAGE}test_a_damaged_file_is_a_picture_or_refused_in_one_line",
             reason="There is no option that accepts half a picture."),
    78: kind("95 megapixels", "image: 95 megapixels", f"{IMAGE}test_too_many_pixels_are_refused_before_decoding"),
    79: kind("400 megapixels promised", "image: 400 megapixels"),
    80: kind("formats with a history", "image: pdf", "image: postscript", "image: fits", "image: icon",
             "image: jpeg 2000"),
    81: kind("EXIF orientations", f"{IMAGE}test_a_picture_is_turned_upright_once"),
    83: kind("16-bit grey", f"{IMAGE}test_grey_of_16_bits_is_scaled_not_clipped"),
    84: kind("16-bit colour", f"{IMAGE}test_colours_of_16_bits"),
    85: kind("floating-point pixels", "image: float tiff"),
    86: kind("CMYK", f"{IMAGE}test_cmyk_is_told", f"{IMAGE}test_an_embedded_profile_is_applied",
             f"{IMAGE}test_a_broken_profile_is_told_and_ignored"),
    88: kind("transparency", f"{IMAGE}test_transparency_shows_white"),
    89: kind("1-bit, grey, palette, LAB, YCbCr, HSV", f"{IMAGE}test_other_modes_keep_their_colours"),
    90: kind("many frames", f"{IMAGE}test_of_many_frames_the_first_is_used"),
    93: kind("HEIC, AVIF, RAW, Photoshop", "image: heic*", "image: avif", "image: raw", "image: photoshop"),
    94: kind("pictures too small or too long", "image: one pixel", "image: a line", "image: a strip",
             f"{IMAGE}test_too_small_or_too_long_is_refused"),
    95: kind("odd sizes", f"{PIPELINE}test_odd_latent_sizes", f"{IMAGE}test_the_default_size_keeps_the_aspect",
             f"{PIPELINE}test_the_result_comes_back_at_the_size_that_went_in", "option: --size*",
             f"{IMAGE}test_impossible_sizes_are_refused", "option: --output-size*"),
    96: kind("far above the native size", f"{CLI}test_doubtful_wishes_are_warned_of", "option: --size 99999"),
    97: kind("a mask that does not fit", f"{CLI}test_a_mask_is_refused_before_anything_is_loaded",
             "option: --only-where *", "app/test_batch.py::test_a_mask_for_nothing_is_refused_at_once",
             "app/test_batch.py::test_a_mask_that_changes_during_the_run_is_not_that_of_the_plan",
             "engine/test_request.py::test_a_mask_beside_what_the_model_works_at_is_refused"),
    98: kind("names of any kind", f"{CLI}test_any_name_works", "image: null byte", "image: 300 letters",
             "image: bytes that are not UTF-8", "image: line break", "option: bytes that are not UTF-8",
             "output: too long", "output: default too long", "output: null byte",
             f"{HEADER}test_a_name_of_any_bytes_makes_one_printable_line"),
    100: kind("a bomb in a PNG's text", "image: text bomb"),
    101: kind("predictions that are not finite",
              f"{ENGINE}test_values_that_are_not_finite_are_named_at_every_step_and_branch",
              f"{ENGINE}test_latents_that_overflow_are_named", f"{WORK}test_not_a_number_at_every_step_and_branch",
              f"{WORK}test_not_a_number_in_half_precision_is_repaired",
              f"{WORK}test_not_a_number_with_prompt_to_prompt",
              f"{RUNNER}test_values_that_half_precision_cannot_hold_are_computed_in_float32"),
    102: kind("SDXL's autoencoder in float16", "engine/test_coding.py::test_half_precision_that_overflows",
              "oracle/test_family_edit.py::test_the_autoencoder_of_sdxl_stays_float32"),
    103: kind("SD 2.1's attention in float16",
              "oracle/test_families.py::test_attention_is_float32_where_the_config_asks"),
    104: kind("NaN in a result", f"{IMAGE}test_non_finite_pixels_are_never_written",
              f"{PIPELINE}test_values_that_are_not_finite_are_never_saved_as_a_picture"),
    105: kind("no memory left on the device", f"{ENGINE}test_out_of_memory_splits_the_batch_and_goes_on",
              "engine/test_coding.py::test_tiles_after_memory_ran_out",
              f"{RUNNER}test_the_unet_goes_on_with_fewer_at_a_time",
              f"{RUNNER}test_the_autoencoder_goes_on_in_tiles", f"{WORK}test_out_of_memory_in_each_phase",
              f"{RUNNER}test_where_nothing_helps_the_size_that_would_fit_is_named",
              f"{WORK}test_out_of_memory_at_each_call_of_the_unet"),
    106: kind("weights larger than the memory",
              f"{NETWORKS}test_weights_that_cannot_fit_are_refused_before_they_are_read"),
    107: kind("a full disk, a killed save", f"{WHOLE}test_killed_at_fifty_moments_of_a_save",
              f"{WHOLE}test_the_kills_find_a_writer_that_is_not_atomic", f"{WHOLE}test_a_full_disk_is_one_line",
              f"{WHOLE}test_a_disk_that_fails_at_any_step_of_a_write",
              f"{WHOLE}test_four_processes_write_the_same_file", f"{CLI}test_a_disk_that_fills_up_leaves_nothing"),
    109: kind("a folder that cannot be written", "output: no such folder", "output: folder is a file",
              "robustness/test_bad_options.py::test_a_folder_without_the_right_to_write"),
    110: kind("names of results that cannot be", "output: *ending*", "output: dash", "output: empty",
              "output: *exists", "output: is a pipe", "output: the input*", "output: twice",
              "output: invert over a file", f"{WRITE}test_every_output_format_can_be_read_again"),
    111: kind("a result too wide for its format", "output: too wide for webp",
              f"{WRITE}test_formats_that_cannot_hold_the_picture_are_refused"),
    112: kind("Ctrl-C and SIGTERM", f"{WHOLE}test_signalled_at_random_moments_of_an_edit",
              f"{WHOLE}test_interrupted_while_it_imports", f"{CLI}test_a_stopped_process_leaves_nothing"),
    114: kind("an inversion of something else", f"{CLI}test_an_inversion_of_another_model_is_refused",
              f"{CLI}test_what_made_an_inversion_stays", f"{PIPELINE}test_a_damaged_saved_inversion_is_refused",
              "app/test_parts.py::test_an_inversion_belongs_to_its_lora"),
    116: kind("seeds", "option: --seed*"),
    117: kind("a device that is not there", "option: --device*"),
    118: kind("float16 on a CPU", f"{NETWORKS}test_a_cpu_is_never_given_float16_unasked", "option: --dtype*"),
    119: kind("a name of the hub, offline", "checkpoint: repo id", "weights/test_hub.py::test_what_is_no_id",
              "weights/test_hub.py::test_what_is_not_there_is_one_command_away",
              "app/test_sealed.py::test_what_is_not_there_is_not_fetched"),
    120: kind("pictures that keep their decoder busy", f"{OPENING}test_a_decoder_is_not_kept_busy",
              f"{OPENING}test_pages_are_never_counted", f"{OPENING}test_an_avif_with_exif_that_promises_is_refused"),
    121: kind("pictures opened by many threads",
              f"{OPENING}test_threads_open_pictures_and_the_process_stays_as_it_was"),
    122: kind("somebody else's files in the folder of a batch", "app/test_batch.py::test_what_is_somebody_elses_stays",
              "app/test_batch.py::test_an_errors_file_of_somebody_else_stays",
              "app/test_batch.py::test_what_another_process_is_writing_stays"),
    123: kind("pipes and devices in place of files", "files/test_write.py::test_only_a_file_is_replaced",
              "app/test_jobs.py::test_a_table_that_never_ends_is_refused", "output: a link to *"),
    124: kind("a terminal that takes no more", f"{CLI}test_what_cannot_be_said_changes_nothing"),
    125: kind("file systems that cannot sync or rename",
              "files/test_write.py::test_a_file_system_that_cannot_sync_or_rename_still_gets_its_file"),
    126: kind("saved inversions of impossible pictures",
              "files/test_inversion.py::test_impossible_pictures_are_refused_by_the_header"),
    127: kind("slips in a call from Python", "engine/test_request.py::test_a_slip_is_refused_with_the_way_out"),
    128: kind("colours that are coded in another way",
              f"{OPENING}test_colours_that_are_not_converted_are_told"),
    129: kind("a signal, or a lost machine, while Ray works",
              "app/test_batch_cluster.py::test_a_signal_ends_it_with_one_line_and_nothing_stays",
              "app/test_batch_cluster.py::test_a_cluster_of_three_machines_loses_one"),
}  # fmt: skip
# Words that no option has: relatives of no kind above.
TYPING = ("option: q.png", "option: no *", "option: unknown *", "option: invert *", "option: inspect nothing",
          "option: misspelt *", "option: word in *", "option: --prediction-type *", "option: --target *",
          "option: --negative *", "option: --source zeppelin", "option: --p2p *", "option: --scale *",
          "option: --threshold=*", "option: --cross *", "option: --blend *", "option: --guidance-scal *",
          "option: --prompt *", "option: --solver *", "option: --mask *", "option: --preset *")  # fmt: skip


@cache
def rows() -> dict[str, str]:
    """Name of every row -> its file."""
    found: dict[str, str] = {}
    for path in sorted(HERE.glob("test_bad_*.py")):
        spec = importlib.util.spec_from_file_location(f"ledits_min_catalogue_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= {row["name"]: path.name for row in module.ROWS}
    return found


@cache
def places(file: str) -> dict[str, str]:
    """Name of every test in a file -> its place, which may be in a class."""
    found: dict[str, str] = {}
    for node in ast.parse((TESTS / file).read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        owner = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {item.name: f"{owner}{item.name}" for item in inner if isinstance(item, ast.FunctionDef)}
    return found


def rows_like(pattern: str) -> list[str]:
    return [name for name in rows() if fnmatchcase(name, pattern)]


@pytest.mark.parametrize("number", CATALOGUE)
def test_a_kind_has_inputs_or_a_reason(number: int) -> None:
    what, proofs, reason = CATALOGUE[number]
    assert what and (proofs or reason)
    for proof in proofs:
        file, _, test = proof.partition("::")
        assert test in places(file) if test else rows_like(proof), proof


def test_every_bad_input_is_of_some_kind() -> None:
    patterns = [*TYPING, *(proof for kind in CATALOGUE.values() for proof in kind.proofs)]
    assert all(rows_like(pattern) for pattern in TYPING)
    strays = [name for name in rows() if not any(fnmatchcase(name, pattern) for pattern in patterns)]
    assert not strays
    assert len(CATALOGUE) == 108 and all(kind.proofs for kind in CATALOGUE.values())


def test_every_test_that_the_readme_names_is_there() -> None:
    text = (HERE / "README.md").read_text()
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", text)
    assert len(named) > 40
    assert [f"{file}::{test}" for file, test in named if test not in places(file)] == []
    assert all(rows_like(pattern) for pattern in re.findall(r"rows `([^`]+)`", text))


def main() -> None:
    """The proofs as pytest takes them."""
    found: dict[str, None] = {}
    for pattern in (*TYPING, *(proof for kind in CATALOGUE.values() for proof in kind.proofs)):
        file, _, test = pattern.partition("::")
        if test:
            found[f"tests/{file}::{places(file)[test]}"] = None
        for name in rows_like(pattern):
            found[f"tests/robustness/{rows()[name]}::test_ends_in_one_line[{name}]"] = None
    print("\n".join(name for name in found if name.isascii()))


if __name__ == "__main__":
    main()
