"""The C header as ctypes declarations. Made by generate_binding.py from include/lycore.h; do not edit."""

from __future__ import annotations

from ctypes import (
    CDLL,
    CFUNCTYPE,
    POINTER,
    Structure,
    c_bool,
    c_char_p,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from enum import IntEnum

LYCORE_DEVICE_CPU = 1
LYCORE_DEVICE_CUDA = 2
LYCORE_DTYPE_INT = 0
LYCORE_DTYPE_UINT = 1
LYCORE_DTYPE_FLOAT = 2
LYCORE_DTYPE_BFLOAT = 4
LYCORE_DTYPE_FLOAT8_E4M3FN = 10
LYCORE_DTYPE_FLOAT8_E5M2 = 12
LYCORE_MAX_DIMS = 16
LYCORE_VERSION_MAJOR = 0
LYCORE_VERSION_MINOR = 1
LYCORE_VERSION_PATCH = 0
LYCORE_BACKUP_DEVICE = 0
LYCORE_BACKUP_HOST = 1
LYCORE_BACKUP_AUTO = 2
LYCORE_BACKUP_COMPACT = 3
LYCORE_ROUNDING_NEAREST = 0
LYCORE_ROUNDING_STOCHASTIC = 1
LYCORE_LAYER_SLIDING = 0
LYCORE_LAYER_LAYER_NORM = 1
LYCORE_LAYER_RMS_NORM = 2
LYCORE_LAYER_GROUP_NORM = 3
LYCORE_NO_MODULE = 4294967295
LYCORE_BUFFER_PARAMETERS = 0
LYCORE_BUFFER_GRADIENTS = 1
LYCORE_BUFFER_EMA = 2
LYCORE_MOMENT_STEP = 0
LYCORE_MOMENT_EPOCH = 1
LYCORE_MOMENT_END = 2


class lycore_status(IntEnum):
    LYCORE_OK = 0
    LYCORE_NULL_ARGUMENT = 1
    LYCORE_BAD_ARGUMENT = 2
    LYCORE_BAD_HANDLE = 3
    LYCORE_BUSY = 4
    LYCORE_CANCELLED = 5
    LYCORE_UNSUPPORTED = 6
    LYCORE_BACKEND = 7
    LYCORE_PANIC = 8
    LYCORE_FILE = 100
    LYCORE_KEY = 200
    LYCORE_SHAPE = 300
    LYCORE_DTYPE = 301
    LYCORE_DEVICE = 400
    LYCORE_TRAIN = 500


lycore_progress_callback = CFUNCTYPE(c_bool, c_void_p, c_uint64, c_uint64)


class lycore_module(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("name", c_char_p),
        ("algorithm", c_char_p),
        ("rank", c_uint64),
        ("alpha", c_double),
        ("tensor_count", c_uint64),
    ]


class lycore_device(Structure):
    _fields_ = [
        ("device_type", c_int32),
        ("device_id", c_int32),
    ]


class lycore_dtype(Structure):
    _fields_ = [
        ("code", c_uint8),
        ("bits", c_uint8),
        ("lanes", c_uint16),
    ]


class lycore_tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("device", lycore_device),
        ("ndim", c_int32),
        ("dtype", lycore_dtype),
        ("shape", POINTER(c_int64)),
        ("strides", POINTER(c_int64)),
        ("byte_offset", c_uint64),
    ]


class lycore_slice(Structure):
    _fields_ = [
        ("axis", c_uint64),
        ("start", c_uint64),
        ("length", c_uint64),
    ]


class lycore_strengths(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("unet", c_double),
        ("text_encoder", c_double),
        ("module_count", c_uint64),
        ("module_patterns", POINTER(c_char_p)),
        ("module_strengths", POINTER(c_double)),
    ]


class lycore_progress(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("callback", lycore_progress_callback),
        ("user_data", c_void_p),
        ("cancel", c_void_p),
    ]


class lycore_applied(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("changed", c_uint64),
        ("kept", c_uint64),
    ]


class lycore_geometry(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("axes", c_uint64),
        ("stride", POINTER(c_int64)),
        ("padding", POINTER(c_int64)),
        ("dilation", POINTER(c_int64)),
        ("groups", c_uint64),
    ]


class lycore_patch(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("count", c_uint64),
        ("names", POINTER(c_char_p)),
        ("tensors", POINTER(lycore_tensor)),
        ("strength", c_double),
        ("slice", POINTER(lycore_slice)),
    ]


class lycore_layer(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("form", c_int32),
        ("has_bias", c_bool),
        ("shape", POINTER(c_int64)),
        ("ndim", c_uint64),
        ("geometry", POINTER(lycore_geometry)),
        ("groups", c_uint64),
        ("eps", c_double),
        ("weight", POINTER(lycore_tensor)),
    ]


class lycore_step(Structure):
    _fields_ = [
        ("struct_size", c_uint64),
        ("step", c_uint64),
        ("learning_rate", c_double),
        ("gradient_norm", c_double),
        ("updated", c_bool),
        ("skipped", c_uint64),
    ]


def declare(library: CDLL) -> None:
    """Gives every function of the header its types; AttributeError when the library lacks one."""
    library.lycore_status_text.restype = c_char_p
    library.lycore_status_text.argtypes = [c_int32]
    library.lycore_error_status.restype = c_int32
    library.lycore_error_status.argtypes = [c_void_p]
    library.lycore_error_message.restype = c_char_p
    library.lycore_error_message.argtypes = [c_void_p]
    library.lycore_error_hint.restype = c_char_p
    library.lycore_error_hint.argtypes = [c_void_p]
    library.lycore_error_key.restype = c_char_p
    library.lycore_error_key.argtypes = [c_void_p]
    library.lycore_error_file.restype = c_char_p
    library.lycore_error_file.argtypes = [c_void_p]
    library.lycore_error_free.restype = c_int32
    library.lycore_error_free.argtypes = [c_void_p]
    library.lycore_text_free.restype = c_int32
    library.lycore_text_free.argtypes = [c_void_p]
    library.lycore_cancel_new.restype = c_int32
    library.lycore_cancel_new.argtypes = [POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_cancel_request.restype = c_int32
    library.lycore_cancel_request.argtypes = [c_void_p]
    library.lycore_cancel_reset.restype = c_int32
    library.lycore_cancel_reset.argtypes = [c_void_p]
    library.lycore_cancel_free.restype = c_int32
    library.lycore_cancel_free.argtypes = [c_void_p]
    library.lycore_version_number.restype = c_uint32
    library.lycore_version_number.argtypes = []
    library.lycore_version.restype = c_char_p
    library.lycore_version.argtypes = []
    library.lycore_torch_version.restype = c_char_p
    library.lycore_torch_version.argtypes = []
    library.lycore_capabilities.restype = c_int32
    library.lycore_capabilities.argtypes = [POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_adapter_open.restype = c_int32
    library.lycore_adapter_open.argtypes = [c_char_p, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_adapter_open_memory.restype = c_int32
    library.lycore_adapter_open_memory.argtypes = [POINTER(c_uint8), c_uint64, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_adapter_report.restype = c_int32
    library.lycore_adapter_report.argtypes = [c_void_p, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_report_text.restype = c_int32
    library.lycore_report_text.argtypes = [c_char_p, c_int32, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_adapter_module_count.restype = c_uint64
    library.lycore_adapter_module_count.argtypes = [c_void_p]
    library.lycore_adapter_module.restype = c_int32
    library.lycore_adapter_module.argtypes = [c_void_p, c_uint64, POINTER(lycore_module), POINTER(c_void_p)]
    library.lycore_adapter_tensor.restype = c_int32
    library.lycore_adapter_tensor.argtypes = [
        c_void_p,
        c_uint64,
        c_uint64,
        POINTER(c_char_p),
        POINTER(lycore_tensor),
        POINTER(c_void_p),
    ]
    library.lycore_adapter_save.restype = c_int32
    library.lycore_adapter_save.argtypes = [c_void_p, c_char_p, POINTER(c_void_p)]
    library.lycore_adapter_prefix.restype = c_int32
    library.lycore_adapter_prefix.argtypes = [c_void_p, c_uint64, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_adapter_free.restype = c_int32
    library.lycore_adapter_free.argtypes = [c_void_p]
    library.lycore_stack_new.restype = c_int32
    library.lycore_stack_new.argtypes = [c_int32, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_stack_add_target.restype = c_int32
    library.lycore_stack_add_target.argtypes = [c_void_p, c_char_p, POINTER(lycore_tensor), POINTER(c_void_p)]
    library.lycore_stack_add_alias.restype = c_int32
    library.lycore_stack_add_alias.argtypes = [c_void_p, c_char_p, c_char_p, POINTER(lycore_slice), POINTER(c_void_p)]
    library.lycore_stack_allow_other_families.restype = c_int32
    library.lycore_stack_allow_other_families.argtypes = [c_void_p, c_int32, POINTER(c_void_p)]
    library.lycore_stack_set_rounding.restype = c_int32
    library.lycore_stack_set_rounding.argtypes = [c_void_p, c_int32, c_uint32, POINTER(c_void_p)]
    library.lycore_stack_set_scale.restype = c_int32
    library.lycore_stack_set_scale.argtypes = [c_void_p, c_char_p, c_float, POINTER(c_void_p)]
    library.lycore_stack_self_check.restype = c_int32
    library.lycore_stack_self_check.argtypes = [c_void_p, c_int32, POINTER(c_void_p)]
    library.lycore_stack_info.restype = c_int32
    library.lycore_stack_info.argtypes = [c_void_p, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_stack_add_adapter.restype = c_int32
    library.lycore_stack_add_adapter.argtypes = [
        c_void_p,
        c_void_p,
        POINTER(lycore_strengths),
        POINTER(c_uint64),
        POINTER(c_void_p),
    ]
    library.lycore_stack_set_strengths.restype = c_int32
    library.lycore_stack_set_strengths.argtypes = [c_void_p, c_uint64, POINTER(lycore_strengths), POINTER(c_void_p)]
    library.lycore_stack_remove_adapter.restype = c_int32
    library.lycore_stack_remove_adapter.argtypes = [c_void_p, c_uint64, POINTER(c_void_p)]
    library.lycore_stack_apply.restype = c_int32
    library.lycore_stack_apply.argtypes = [
        c_void_p,
        c_void_p,
        POINTER(lycore_progress),
        POINTER(lycore_applied),
        POINTER(c_void_p),
    ]
    library.lycore_stack_restore.restype = c_int32
    library.lycore_stack_restore.argtypes = [c_void_p, c_void_p, POINTER(c_void_p)]
    library.lycore_stack_forward.restype = c_int32
    library.lycore_stack_forward.argtypes = [
        c_void_p,
        c_char_p,
        POINTER(lycore_geometry),
        POINTER(lycore_tensor),
        POINTER(lycore_tensor),
        c_void_p,
        POINTER(c_void_p),
    ]
    library.lycore_stack_report.restype = c_int32
    library.lycore_stack_report.argtypes = [c_void_p, c_uint64, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_stack_free.restype = c_int32
    library.lycore_stack_free.argtypes = [c_void_p]
    library.lycore_weight_merge.restype = c_int32
    library.lycore_weight_merge.argtypes = [
        c_char_p,
        POINTER(lycore_tensor),
        POINTER(lycore_patch),
        c_uint64,
        c_void_p,
        POINTER(c_void_p),
    ]
    library.lycore_checkpoint_merge.restype = c_int32
    library.lycore_checkpoint_merge.argtypes = [
        c_char_p,
        POINTER(c_void_p),
        POINTER(lycore_strengths),
        c_uint64,
        c_char_p,
        c_char_p,
        POINTER(lycore_progress),
        POINTER(c_void_p),
        POINTER(c_void_p),
    ]
    library.lycore_adapter_convert.restype = c_int32
    library.lycore_adapter_convert.argtypes = [
        c_void_p,
        c_char_p,
        c_char_p,
        POINTER(lycore_progress),
        POINTER(c_void_p),
        POINTER(c_void_p),
    ]
    library.lycore_network_new.restype = c_int32
    library.lycore_network_new.argtypes = [c_char_p, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_network_schema.restype = c_int32
    library.lycore_network_schema.argtypes = [POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_network_config.restype = c_int32
    library.lycore_network_config.argtypes = [c_void_p, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_network_operator.restype = c_int32
    library.lycore_network_operator.argtypes = [POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_network_add_layer.restype = c_int32
    library.lycore_network_add_layer.argtypes = [
        c_void_p,
        c_char_p,
        POINTER(lycore_layer),
        POINTER(c_uint64),
        POINTER(c_void_p),
    ]
    library.lycore_network_needs_weight.restype = c_int32
    library.lycore_network_needs_weight.argtypes = [c_void_p, c_uint64, POINTER(c_bool), POINTER(c_void_p)]
    library.lycore_network_set_ranks.restype = c_int32
    library.lycore_network_set_ranks.argtypes = [c_void_p, c_double, c_void_p, POINTER(c_void_p)]
    library.lycore_network_evaluate.restype = c_int32
    library.lycore_network_evaluate.argtypes = [c_void_p, c_bool, POINTER(c_void_p)]
    library.lycore_network_build.restype = c_int32
    library.lycore_network_build.argtypes = [c_void_p, lycore_device, POINTER(c_void_p)]
    library.lycore_network_forward.restype = c_int32
    library.lycore_network_forward.argtypes = [
        c_void_p,
        c_uint64,
        POINTER(lycore_tensor),
        POINTER(lycore_tensor),
        POINTER(lycore_tensor),
        c_void_p,
        POINTER(c_void_p),
    ]
    library.lycore_network_backward.restype = c_int32
    library.lycore_network_backward.argtypes = [
        c_void_p,
        c_uint64,
        POINTER(lycore_tensor),
        POINTER(lycore_tensor),
        POINTER(lycore_tensor),
        POINTER(lycore_tensor),
        c_void_p,
        POINTER(c_void_p),
    ]
    library.lycore_network_step.restype = c_int32
    library.lycore_network_step.argtypes = [c_void_p, c_void_p, POINTER(lycore_step), POINTER(c_void_p)]
    library.lycore_network_results.restype = c_int32
    library.lycore_network_results.argtypes = [c_void_p, POINTER(lycore_step), POINTER(c_void_p)]
    library.lycore_network_hold.restype = c_int32
    library.lycore_network_hold.argtypes = [c_void_p, c_bool, c_void_p, POINTER(c_void_p)]
    library.lycore_network_prepare_replay.restype = c_int32
    library.lycore_network_prepare_replay.argtypes = [c_void_p, c_uint64, c_void_p, POINTER(c_void_p)]
    library.lycore_network_zero_gradients.restype = c_int32
    library.lycore_network_zero_gradients.argtypes = [c_void_p, c_void_p, POINTER(c_void_p)]
    library.lycore_network_buffer.restype = c_int32
    library.lycore_network_buffer.argtypes = [c_void_p, c_int32, POINTER(lycore_tensor), POINTER(c_void_p)]
    library.lycore_network_refresh.restype = c_int32
    library.lycore_network_refresh.argtypes = [c_void_p, c_void_p, POINTER(c_void_p)]
    library.lycore_network_progress.restype = c_int32
    library.lycore_network_progress.argtypes = [c_void_p, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_void_p)]
    library.lycore_network_parameter_count.restype = c_uint64
    library.lycore_network_parameter_count.argtypes = [c_void_p]
    library.lycore_network_epochs.restype = c_uint64
    library.lycore_network_epochs.argtypes = [c_void_p]
    library.lycore_network_free.restype = c_int32
    library.lycore_network_free.argtypes = [c_void_p]
    library.lycore_network_save.restype = c_int32
    library.lycore_network_save.argtypes = [c_void_p, c_char_p, c_int32, c_char_p, c_char_p, POINTER(c_void_p)]
    library.lycore_network_checkpoint.restype = c_int32
    library.lycore_network_checkpoint.argtypes = [
        c_void_p,
        c_int32,
        c_double,
        c_void_p,
        POINTER(c_void_p),
        POINTER(c_void_p),
    ]
    library.lycore_network_adapter.restype = c_int32
    library.lycore_network_adapter.argtypes = [c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_void_p)]
    library.lycore_network_save_state.restype = c_int32
    library.lycore_network_save_state.argtypes = [c_void_p, c_char_p, POINTER(c_void_p)]
    library.lycore_network_load_state.restype = c_int32
    library.lycore_network_load_state.argtypes = [c_void_p, c_char_p, POINTER(c_void_p)]
    library.lycore_network_load_weights.restype = c_int32
    library.lycore_network_load_weights.argtypes = [c_void_p, c_char_p, POINTER(c_uint64), POINTER(c_void_p)]
    library.lycore_resize.restype = c_int32
    library.lycore_resize.argtypes = [
        c_char_p,
        c_char_p,
        c_char_p,
        POINTER(lycore_progress),
        POINTER(c_void_p),
        POINTER(c_void_p),
    ]
    library.lycore_combine.restype = c_int32
    library.lycore_combine.argtypes = [
        POINTER(c_char_p),
        POINTER(c_double),
        c_uint64,
        c_char_p,
        c_char_p,
        POINTER(lycore_progress),
        POINTER(c_void_p),
        POINTER(c_void_p),
    ]
    library.lycore_extract.restype = c_int32
    library.lycore_extract.argtypes = [
        c_char_p,
        c_char_p,
        c_char_p,
        c_char_p,
        POINTER(lycore_progress),
        POINTER(c_void_p),
        POINTER(c_void_p),
    ]
