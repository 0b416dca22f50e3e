"""`ledits web`: the page served on this machine until Ctrl-C. Only what is named here leaves or enters it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import tempfile
import threading
from pathlib import Path

from ledits_min.app.inputs import parts
from ledits_min.app.terminal import say, tell
from ledits_min.errors import InputError, check_whole

MAX_UPLOAD = "32mb"


def check_web(args: argparse.Namespace) -> None:
    """What can be refused before torch and Gradio are imported."""
    from ledits_min.weights.read.survey import survey_whole

    check_whole("--port", args.port, 1, 65_535, optional=True)
    try:
        found = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        found = ""
    if not found or int(found.split(".")[0]) < 6:
        have = f"Gradio {found} is too old" if found else "Gradio is not installed"
        raise InputError(f"`ledits web` needs Gradio 6, and {have}; run: pip install 'ledits-min[web]'")
    args.models = args.models or ["tiny"]
    chosen = parts(args)
    if len(set(args.models)) > 1 and any(chosen.values()):
        options = ", ".join(f"--{name.replace('_', '-')}" for name, value in chosen.items() if value)
        raise InputError(f"{options} would change each of {len(set(args.models))} models; name one --model with it")
    for name in args.models:
        survey_whole(name, **chosen)


def serve(args: argparse.Namespace) -> None:
    """Load the first model, open the page, print its address, and wait."""
    with tempfile.TemporaryDirectory(prefix="ledits-web-") as place:
        # Before Gradio is imported, which reads them then: no telemetry, and its copies of pictures lie where ours do.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = place
        import gradio as gr

        from ledits_min.app.web.layout import SAMPLES
        from ledits_min.app.web.page import STYLE, Page
        from ledits_min.app.web.session import Models, warnings_to_visitors

        models = Models(args.models, args.device, args.dtype, compile=args.compile, **parts(args))
        with warnings_to_visitors():
            page = Page(models, Path(place))
            fonts = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
            mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
            theme = gr.themes.Base(primary_hue="teal", neutral_hue="zinc", font=fonts, font_mono=mono)
            theme.set(
                button_primary_background_fill="*primary_700", button_primary_background_fill_dark="*primary_700",
                button_primary_background_fill_hover="*primary_600", link_text_color="*primary_700",
                link_text_color_dark="*primary_400",
            )  # fmt: skip
            try:
                _, address, _ = page.blocks.launch(
                    server_name=args.host, server_port=args.port, share=False, quiet=True, prevent_thread_lock=True,
                    inbrowser=False, show_error=False, max_file_size=MAX_UPLOAD, footer_links=[], ssr_mode=False,
                    allowed_paths=[str(SAMPLES[0].parent)], theme=theme, css_paths=STYLE, enable_monitoring=False,
                    pwa=False, mcp_server=False, run_history=False,
                )  # fmt: skip
            except OSError as error:
                raise InputError(f"{args.host} port {args.port or 'from 7860'}: {error}; pass another --port") from None
            try:
                if args.host not in ("127.0.0.1", "localhost", "::1"):
                    say(f"warning: --host {args.host}: whoever reaches this machine can use the page")
                tell(f"ledits is at {address}  (Ctrl-C ends it)")
                threading.Event().wait()
            finally:
                for session in list(page.visits.values()):
                    session.close()
                page.blocks.close(verbose=False)
                models.close()
