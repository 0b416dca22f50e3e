"""ComfyUI nodes: link or copy this folder into ComfyUI's custom_nodes; ComfyUI reads the two mappings.

Nothing of ComfyUI is imported before it asks a node for its inputs or runs it.
"""

try:
    from ledits_min.app.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ModuleNotFoundError as error:
    if error.name != "ledits_min":
        raise
    raise ImportError(
        "the LEDITS nodes need ledits_min in the Python that runs ComfyUI; install it there: "
        "python -m pip install PATH_OF_THE_CHECKOUT"
    ) from None

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
