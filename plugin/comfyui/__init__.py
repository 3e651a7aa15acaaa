"""LyCore as a ComfyUI custom node: copy or link this folder into ComfyUI's `custom_nodes`."""

from . import nodes, train

NODE_CLASS_MAPPINGS = nodes.NODE_CLASS_MAPPINGS | train.NODE_CLASS_MAPPINGS
NODE_DISPLAY_NAME_MAPPINGS = nodes.NODE_DISPLAY_NAME_MAPPINGS | train.NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
