// LyCore: loads, merges, scales and trains LoRA / LyCORIS adapters.
// Made by cbindgen from src/ffi; do not edit.
//
// Conventions, kept by every call:
//
// - Calls that can fail return lycore_status: LYCORE_OK (0) or a number that says which kind of failure. They take `lycore_error **error` last,
//   which may be NULL; on failure it receives an object with message, hint, key and file, to be freed with lycore_error_free, on success NULL.
// - On failure no other output is written, and nothing is left half done that the call's description does not name.
// - Objects are opaque handles. Every `_new` and `_open` has its `_free`. A freed handle, a handle of another type or any other value is
//   answered with LYCORE_BAD_HANDLE (the documented neutral value where a call returns something else), never with a crash.
// - Texts are NUL-terminated UTF-8. `const char *` results belong to the library and say how long they live; `char *` results belong to the
//   caller, who frees them with lycore_text_free. Paths are UTF-8.
// - Arrays are a pointer and a count; the pointer is not looked at when the count is 0. Structs that may grow begin with struct_size, which the
//   caller sets to sizeof the struct.
// - Tensors are described by lycore_tensor, which mirrors DLPack's DLTensor; their memory stays the caller's.
//
// Threads: every function may be called from any thread. Adapters, errors, cancel flags and texts may be used by several threads at once. A stack
// or a network serves one call at a time and answers LYCORE_BUSY to a second thread instead of waiting. A handle that is freed while another
// thread uses it lives until that call returns. Callbacks run on the thread of the call that they belong to. The library does no work at load or
// unload time and installs no signal handlers; its own CPU threads (LYCORE_NUM_THREADS, default: all) start with the first call that needs them,
// so fork before that call or not at all.
//
// GPU: calls that take a `stream` enqueue their work on it and do not wait, except where they say so; NULL means libtorch's current stream of the
// calling thread, without libtorch the legacy default stream, which (void *)1 always means. Calls that take none work on libtorch's current stream.
// A stack's copies of weights and a network's buffers belong to the stream that was used first: use one stream for an object, or synchronise between
// two. While a call runs, autocast is off on its thread, also in its callbacks.
//
// Numbers: W' = W + sum of strength * delta(W), every delta from the pristine W, products summed in fp32, one rounding to nearest even into W's
// dtype. Strength 0 and restore give W back bit for bit.


#ifndef LYCORE_H
#define LYCORE_H

#include <stdbool.h>
#include <stdint.h>

// kDLCPU
#define LYCORE_DEVICE_CPU 1

// kDLCUDA
#define LYCORE_DEVICE_CUDA 2

// kDLInt
#define LYCORE_DTYPE_INT 0

// kDLUInt
#define LYCORE_DTYPE_UINT 1

// kDLFloat: 16, 32 or 64 bits, IEEE
#define LYCORE_DTYPE_FLOAT 2

// kDLBfloat: 16 bits
#define LYCORE_DTYPE_BFLOAT 4

// kDLFloat8_e4m3fn: 8 bits, without infinities, at most 448
#define LYCORE_DTYPE_FLOAT8_E4M3FN 10

// kDLFloat8_e5m2: 8 bits, at most 57344
#define LYCORE_DTYPE_FLOAT8_E5M2 12

// The most axes that a tensor may have.
#define LYCORE_MAX_DIMS 16

// Major version of the header: calls may go away when it changes.
#define LYCORE_VERSION_MAJOR 0

// Minor version of the header: calls may be added when it changes (while the major version is 0: also changed).
#define LYCORE_VERSION_MINOR 1

// Patch version of the header.
#define LYCORE_VERSION_PATCH 0

// Keep the pristine weights on the weights' own device: fastest.
#define LYCORE_BACKUP_DEVICE 0

// Keep the pristine weights in host memory.
#define LYCORE_BACKUP_HOST 1

// Keep them on the device where there is room for them, else compactly, else in host memory; lycore_stack_info says which and why.
#define LYCORE_BACKUP_AUTO 2

// Keep no copies: fp16 and bf16 weights on a GPU are merged in place, and what rounding lost of them, a quarter of their size, is kept on their
// device (more where an adapter changes them beyond recognition). lycore_stack_apply waits for the stream then. Weights that this cannot serve
// (other dtypes, strides, adapters that read the weight) are copied to where there is room.
#define LYCORE_BACKUP_COMPACT 3

// Results are rounded to nearest even.
#define LYCORE_ROUNDING_NEAREST 0

// Results in weights of 8 bits are rounded up or down with the probability of the distance; others to nearest.
#define LYCORE_ROUNDING_STOCHASTIC 1

// lycore_layer: a Linear layer or a convolution, as the shape of its weight says.
#define LYCORE_LAYER_SLIDING 0

// lycore_layer: a LayerNorm over the last axes, those of its weight.
#define LYCORE_LAYER_LAYER_NORM 1

// lycore_layer: an RMSNorm over the last axes, those of its weight.
#define LYCORE_LAYER_RMS_NORM 2

// lycore_layer: a GroupNorm, with a weight of one value per channel.
#define LYCORE_LAYER_GROUP_NORM 3

// The number of a module that does not exist.
#define LYCORE_NO_MODULE 4294967295

// lycore_network_buffer: the fp32 parameters, flat.
#define LYCORE_BUFFER_PARAMETERS 0

// lycore_network_buffer: the fp32 gradients, flat, summed since the last update.
#define LYCORE_BUFFER_GRADIENTS 1

// lycore_network_buffer: the average of the parameters that ema_decay keeps, fp32, flat. It starts where they are in the first step.
#define LYCORE_BUFFER_EMA 2

// lycore_network_checkpoint: after a call of lycore_network_step.
#define LYCORE_MOMENT_STEP 0

// lycore_network_checkpoint: after the last step of an epoch.
#define LYCORE_MOMENT_EPOCH 1

// lycore_network_checkpoint: after the last step of all.
#define LYCORE_MOMENT_END 2

// The result of a call. 0 is success; numbers are never given a second meaning. New ones may appear: treat an unknown one as an error.
enum lycore_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
  // Done.
  LYCORE_OK = 0,
  // A pointer that must not be NULL is.
  LYCORE_NULL_ARGUMENT = 1,
  // A value that this call cannot take; the error's message says which.
  LYCORE_BAD_ARGUMENT = 2,
  // The handle was freed, or is of another type.
  LYCORE_BAD_HANDLE = 3,
  // Another thread is inside a call on this handle.
  LYCORE_BUSY = 4,
  // A progress callback or a cancel flag stopped the call.
  LYCORE_CANCELLED = 5,
  // This build or version cannot do it.
  LYCORE_UNSUPPORTED = 6,
  // libtorch or the operating system failed underneath.
  LYCORE_BACKEND = 7,
  // A defect of the library; nothing was left half done that the call's description does not name. Please report it.
  LYCORE_PANIC = 8,
  // A file cannot be read or written, or lies about its content.
  LYCORE_FILE = 100,
  // A key of a file or the name of a weight does not fit.
  LYCORE_KEY = 200,
  // Shapes that must agree do not.
  LYCORE_SHAPE = 300,
  // A dtype that the call does not take.
  LYCORE_DTYPE = 301,
  // A device that is not there or that this build cannot use.
  LYCORE_DEVICE = 400,
  // Training cannot go on.
  LYCORE_TRAIN = 500,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum lycore_status lycore_status;
#else
typedef int32_t lycore_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// One file's worth of modules. Never changed by being applied; may be used by any number of threads and stacks at once. Freed with
// lycore_adapter_free; a stack keeps what it needs, so the handle may be freed right after it was added.
typedef struct lycore_adapter lycore_adapter;

// A flag that stops the calls that watch it. Any thread may raise it. Freed with lycore_cancel_free.
typedef struct lycore_cancel lycore_cancel;

// What a failed call says. Freed by the caller with lycore_error_free.
typedef struct lycore_error lycore_error;

// A set of modules in training: parameters, gradients, optimizer, schedule, state and files. The host runs its model and calls forward
// and backward per layer. One call at a time; a second thread gets LYCORE_BUSY. Freed with lycore_network_free.
typedef struct lycore_network lycore_network;

// Weights of the host, adapters on them, strengths. One call at a time; a second thread gets LYCORE_BUSY. Freed with lycore_stack_free.
typedef struct lycore_stack lycore_stack;

// One module of an adapter. The texts are valid until the adapter's handle is freed.
typedef struct lycore_module {
  // sizeof(lycore_module), set by the caller.
  uint64_t struct_size;
  // Its name as the file spells it.
  const char *name;
  // The algorithm's usual name, for example "LoRA".
  const char *algorithm;
  // Rank of the factors; 0 where the algorithm has none.
  uint64_t rank;
  // alpha as the file gives it; the rank when it gives none.
  double alpha;
  // How many tensors lycore_adapter_tensor gives.
  uint64_t tensor_count;
} lycore_module;

// DLDevice
typedef struct lycore_device {
  // LYCORE_DEVICE_CPU or LYCORE_DEVICE_CUDA.
  int32_t device_type;
  // Index of the device; 0 for the CPU.
  int32_t device_id;
} lycore_device;

// DLDataType
typedef struct lycore_dtype {
  // One of LYCORE_DTYPE_*.
  uint8_t code;
  // Bits per element: 8, 16 or 32 for the floating-point weights that this version computes with.
  uint8_t bits;
  // 1.
  uint16_t lanes;
} lycore_dtype;

// DLTensor: a view of memory that the caller owns. The library reads or writes the elements that shape and strides reach and nothing
// else. How long the memory must live is said by each call that takes one.
typedef struct lycore_tensor {
  // Address on `device`; may be NULL when a dimension is 0.
  void *data;
  // Where `data` is.
  struct lycore_device device;
  // Number of axes, 0 to LYCORE_MAX_DIMS.
  int32_t ndim;
  // Element type.
  struct lycore_dtype dtype;
  // `ndim` sizes. Not written.
  int64_t *shape;
  // `ndim` steps in elements, not negative; NULL means row-major. Not written.
  int64_t *strides;
  // Added to `data`.
  uint64_t byte_offset;
} lycore_tensor;

// A range along one axis of a weight: where the q, k or v of an adapter lies in a fused one.
typedef struct lycore_slice {
  // 0 (rows) or 1 (columns, input channels).
  uint64_t axis;
  // First index.
  uint64_t start;
  // Number of indices.
  uint64_t length;
} lycore_slice;

// The user's numbers for one adapter. 1 is the usual strength, 0 is none, negative ones are allowed.
typedef struct lycore_strengths {
  // sizeof(lycore_strengths).
  uint64_t struct_size;
  // For the modules of the U-Net (or of whatever denoises).
  double unet;
  // For the modules of text encoders.
  double text_encoder;
  // Number of entries in the two arrays below.
  uint64_t module_count;
  // Names of modules as the file spells them; `*` stands for any text. The last match wins over the two numbers above. May be NULL when
  // module_count is 0.
  const char *const *module_patterns;
  // Their strengths.
  const double *module_strengths;
} lycore_strengths;

// Called on the thread of the long call, after each of its steps, with how much is done of how much; the unit is named by the call. Return
// true to go on, false to stop. Must not call into the object that is at work.
typedef bool (*lycore_progress_callback)(void *user_data, uint64_t done, uint64_t total);

// What a long call reports to and is stopped by. Zero every field that is not used.
typedef struct lycore_progress {
  // sizeof(lycore_progress).
  uint64_t struct_size;
  // May be NULL.
  lycore_progress_callback callback;
  // Passed to the callback.
  void *user_data;
  // May be NULL.
  const struct lycore_cancel *cancel;
} lycore_progress;

// What lycore_stack_apply did.
typedef struct lycore_applied {
  // sizeof(lycore_applied), set by the caller.
  uint64_t struct_size;
  // Weights written.
  uint64_t changed;
  // Weights under adapters that already were as wanted.
  uint64_t kept;
} lycore_applied;

// How a convolution slides over its input. Each array has one value per spatial axis.
typedef struct lycore_geometry {
  // sizeof(lycore_geometry).
  uint64_t struct_size;
  // Number of spatial axes, 1 to 3.
  uint64_t axes;
  // Steps; NULL: 1 everywhere.
  const int64_t *stride;
  // Zeros on both sides; NULL: 0 everywhere.
  const int64_t *padding;
  // Distances between taps; NULL: 1 everywhere.
  const int64_t *dilation;
  // Groups of channels; 0 or 1: one.
  uint64_t groups;
} lycore_geometry;

// One module given by its tensors, at one strength, on all or a slice of a weight.
typedef struct lycore_patch {
  // sizeof(lycore_patch).
  uint64_t struct_size;
  // Number of entries in the two arrays below.
  uint64_t count;
  // Canonical names, as lycore_adapter_tensor gives them: "lora_up.weight", "lora_down.weight", "alpha", "hada_w1_a", ..
  const char *const *names;
  // The tensors: row-major, in host memory or on the weight's device; numbers ("alpha", "on_input", "scalar", "reshape_weight") in host
  // memory.
  const struct lycore_tensor *tensors;
  // The user's number.
  double strength;
  // NULL: the whole weight.
  const struct lycore_slice *slice;
} lycore_patch;

// A layer of the host's model, on which a module is put.
typedef struct lycore_layer {
  // sizeof(lycore_layer).
  uint64_t struct_size;
  // One of LYCORE_LAYER_*.
  int32_t form;
  // Whether it has a bias.
  bool has_bias;
  // Shape of its weight: [out, in], [out, in / groups, kernel..], or a norm's.
  const int64_t *shape;
  // Number of axes of the weight.
  uint64_t ndim;
  // How a convolution slides; NULL: a Linear layer, or 1 everywhere.
  const struct lycore_geometry *geometry;
  // Groups of channels of a GroupNorm.
  uint64_t groups;
  // What a norm adds to the variance.
  double eps;
  // The layer's weight, fp32, fp16 or bf16, for algorithms that start from it (DoRA, T-LoRA); NULL where the host has none at hand. Not
  // used after the call.
  const struct lycore_tensor *weight;
} lycore_layer;

// What lycore_network_step did.
typedef struct lycore_step {
  // sizeof(lycore_step), set by the caller.
  uint64_t struct_size;
  // Updates done so far, this one included.
  uint64_t step;
  // Learning rate of this update; in the middle of an accumulation, of the coming one.
  double learning_rate;
  // Norm of all gradients, averaged over the accumulation, before clipping; 0 in the middle of an accumulation.
  double gradient_norm;
  // False in the middle of a gradient accumulation: nothing was changed yet.
  bool updated;
  // Steps that nobody waited for and that were left out, as their gradient was not finite, since this was last told.
  uint64_t skipped;
} lycore_step;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The short name of a status, for logs; "unknown status" for a number that this version does not know. Static, never NULL.
const char *lycore_status_text(int32_t status);

// The status that the call returned beside this error; LYCORE_BAD_HANDLE when `error` is not a live error.
lycore_status lycore_error_status(const struct lycore_error *error);

// What went wrong: one sentence with file, tensor and numbers. UTF-8, valid until the error is freed; never NULL.
const char *lycore_error_message(const struct lycore_error *error);

// What to do about it; "" when the message says it all. UTF-8, valid until the error is freed; never NULL.
const char *lycore_error_hint(const struct lycore_error *error);

// The tensor, module or key concerned; "" when there is none. UTF-8, valid until the error is freed; never NULL.
const char *lycore_error_key(const struct lycore_error *error);

// The file concerned; "" when there is none. UTF-8, valid until the error is freed; never NULL.
const char *lycore_error_file(const struct lycore_error *error);

// Frees an error. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing.
lycore_status lycore_error_free(struct lycore_error *error);

// Frees a text that a call returned through a `char **`. NULL is accepted; a pointer that is not such a text, or no longer one, returns
// LYCORE_BAD_HANDLE and does nothing.
lycore_status lycore_text_free(char *text);

// A new flag, not raised.
//
// # Safety
// `out` may be written. `error` is NULL or may be written.
lycore_status lycore_cancel_new(struct lycore_cancel **out, struct lycore_error **error);

// Raises the flag: calls that watch it stop at their next step and return LYCORE_CANCELLED. From any thread, at any time.
lycore_status lycore_cancel_request(const struct lycore_cancel *cancel);

// Lowers the flag, so that it can serve another call.
lycore_status lycore_cancel_reset(const struct lycore_cancel *cancel);

// Frees a flag. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing. Calls that watch it go on.
lycore_status lycore_cancel_free(struct lycore_cancel *cancel);

// The library's version as one number: major * 1000000 + minor * 1000 + patch. Compare with the header's LYCORE_VERSION_* .
uint32_t lycore_version_number(void);

// The library's version, "major.minor.patch". Static.
const char *lycore_version(void);

// The libtorch that this build needs in its process, "2.11.0" for example; "" for the build without libtorch. Static.
const char *lycore_torch_version(void);

// What this build can do on this machine, as JSON:
// {"version": "0.1.0", "torch": "2.11.0" or null, "training": bool, "cuda": {"devices": n, "why": text when n is 0},
//  "threads": n, "algorithms": [text]}.
// `json` becomes a text that the caller frees with lycore_text_free. May start CUDA in the process.
//
// # Safety
// `json` may be written. `error` is NULL or may be written.
lycore_status lycore_capabilities(char **json,
                                  struct lycore_error **error);

// Opens an adapter: safetensors, or what torch.save writes (.pt, .ckpt, .bin) as far as it asks for nothing but tensors. The file stays mapped until the adapter is freed and no stack uses it: replace it by renaming another
// over it, never by writing into it. For a PEFT file, `adapter_config.json` beside it gives the alphas.
// A file in which no module can be used is LYCORE_FILE, LYCORE_KEY or LYCORE_UNSUPPORTED.
//
// # Safety
// `path` is a NUL-terminated UTF-8 string. `out` may be written. `error` is NULL or may be written.
lycore_status lycore_adapter_open(const char *path,
                                  struct lycore_adapter **out,
                                  struct lycore_error **error);

// Reads an adapter from the `size` bytes of a safetensors file in memory. The bytes are copied.
//
// # Safety
// `bytes` points to `size` bytes. `out` may be written. `error` is NULL or may be written.
lycore_status lycore_adapter_open_memory(const uint8_t *bytes,
                                         uint64_t size,
                                         struct lycore_adapter **out,
                                         struct lycore_error **error);

// The load report as JSON: {"file", "metadata": {text: text}, "facts", "summary": {"keys", "modules", "readable", "unsupported",
// "malformed"}, "modules": [{"module", "spelling", "algorithm", "rank", "alpha", "dtype", "bytes"}], "keys": [{"key", "status", "reason"?}]}.
// "facts" is what the metadata says, in one form for all trainers; every field may be missing: {"title", "author", "description",
// "license", "usage_hint", "comment", "tags", "date", "tool": {"name", "evidence", "version"}, "base": {"version", "model", "model_hash",
// "vae", "architecture", "implementation", "prediction_type"}, "trigger": {"phrases": [text], "classes": [{"word", "repeats", "images"}],
// "tags": [{"tag", "count"}], "distinct_tags"}, "training": {"module", "args": {}, "dim", "alpha", "dropout", "optimizer", "learning_rate",
// "unet_lr", "text_encoder_lr", "scheduler", "warmup_steps", "steps", "max_steps", "epoch", "epochs", "images", "reg_images", "batch_size",
// "gradient_accumulation_steps", "resolution", "bucket_count", "buckets": [{"resolution", "images"}], "clip_skip", "noise_offset",
// "min_snr_gamma", "mixed_precision", "seed", "loss_type", "seconds"}, "hashes": {"model", "legacy", "sha256"},
// "thumbnail": {"bytes", "type"}, "unreadable": [{"key", "reason"}]}. Of each list the first 24.
// `json` becomes a text that the caller frees with lycore_text_free.
//
// # Safety
// `json` may be written. `error` is NULL or may be written.
lycore_status lycore_adapter_report(const struct lycore_adapter *adapter,
                                    char **json,
                                    struct lycore_error **error);

// A report as plain text of at most 100 columns (longer only where a path or a module's name is): what lycore_adapter_report,
// lycore_stack_report or lycore_checkpoint_merge gave as JSON. Unless `all` is non-zero, lists end after ten entries and say how many more
// there are. `text` becomes a text that the caller frees with lycore_text_free.
//
// # Safety
// `json` is a NUL-terminated UTF-8 string. `text` may be written. `error` is NULL or may be written.
lycore_status lycore_report_text(const char *json,
                                 int32_t all,
                                 char **text,
                                 struct lycore_error **error);

// The number of modules that can be used; 0 when `adapter` is not a live adapter.
uint64_t lycore_adapter_module_count(const struct lycore_adapter *adapter);

// Describes module `index`.
//
// # Safety
// `out` points to a lycore_module whose struct_size is set. `error` is NULL or may be written.
lycore_status lycore_adapter_module(const struct lycore_adapter *adapter,
                                    uint64_t index,
                                    struct lycore_module *out,
                                    struct lycore_error **error);

// Tensor `tensor` of module `index`: its canonical name (for example "lora_up.weight"; static while the adapter lives) and a read-only
// view of it in host memory, valid until the adapter's handle is freed.
//
// # Safety
// `name` and `out` may be written. `error` is NULL or may be written.
lycore_status lycore_adapter_tensor(const struct lycore_adapter *adapter,
                                    uint64_t index,
                                    uint64_t tensor,
                                    const char **name,
                                    struct lycore_tensor *out,
                                    struct lycore_error **error);

// Writes the adapter's modules to a safetensors file in the spelling that it was read in; whole or not at all.
//
// # Safety
// `path` is a NUL-terminated UTF-8 string. `error` is NULL or may be written.
lycore_status lycore_adapter_save(const struct lycore_adapter *adapter,
                                  const char *path,
                                  struct lycore_error **error);

// A new adapter whose modules are cut to their first `rank` ranks (at least 1; modules of a lower rank stay whole), in `out`, freed with
// lycore_adapter_free. For adapters trained so that every prefix works: DyLoRA (alpha stays, so the scale becomes alpha / rank, as the paper and
// sd-scripts have it) and T-LoRA (the scale stays, as under its mask). LYCORE_UNSUPPORTED when no module has nested ranks; modules without them,
// beside others, stay as they are.
//
// # Safety
// `out` may be written. `error` is NULL or may be written.
lycore_status lycore_adapter_prefix(const struct lycore_adapter *adapter,
                                    uint64_t rank,
                                    struct lycore_adapter **out,
                                    struct lycore_error **error);

// Frees the handle. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing. Stacks that use the adapter keep it.
lycore_status lycore_adapter_free(struct lycore_adapter *adapter);

// A new stack without weights and adapters. `backup` is LYCORE_BACKUP_DEVICE, LYCORE_BACKUP_HOST, LYCORE_BACKUP_AUTO or
// LYCORE_BACKUP_COMPACT.
//
// # Safety
// `out` may be written. `error` is NULL or may be written.
lycore_status lycore_stack_new(int32_t backup,
                               struct lycore_stack **out,
                               struct lycore_error **error);

// Registers a weight: fp32, fp16, bf16 or fp8 (see lycore_stack_set_scale), any strides, [out, in] or [out, in / groups, kernel..], under the host's own name (with or
// without ".weight"); or a layer's bias [out], under a name that ends in ".bias"; or a norm's weight [channels]. All weights come before the first adapter. The memory must stay valid until the stack is freed; apply and restore
// write it, and from the first apply until restore its content is the stack's: what the host writes meanwhile is lost. The same memory can be
// registered once; ranges that overlap in part, and two stacks on one weight, are the caller's to avoid.
//
// # Safety
// `name` is a NUL-terminated UTF-8 string; `weight` describes memory as said. `error` is NULL or may be written.
lycore_status lycore_stack_add_target(struct lycore_stack *stack,
                                      const char *name,
                                      const struct lycore_tensor *weight,
                                      struct lycore_error **error);

// Makes `spelling`, a module's name in adapter files, mean the registered weight `target`, or a slice of it (`slice` may be NULL).
// Wins over the built-in rules.
//
// # Safety
// `spelling` and `target` are NUL-terminated UTF-8 strings; `slice` is NULL or points to a slice. `error` is NULL or may be written.
lycore_status lycore_stack_add_alias(struct lycore_stack *stack,
                                     const char *spelling,
                                     const char *target,
                                     const struct lycore_slice *slice,
                                     struct lycore_error **error);

// Whether adapters made for another family of models (a Flux LoRA on SDXL) are taken as far as they fit (`allow` not 0), rather than refused
// with LYCORE_KEY, which names both families; refused by default. An adapter that fits as a whole is never refused.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_stack_allow_other_families(struct lycore_stack *stack,
                                                int32_t allow,
                                                struct lycore_error **error);

// How results are rounded into weights of 8 bits: LYCORE_ROUNDING_NEAREST (the default) or LYCORE_ROUNDING_STOCHASTIC. Either way what is
// beyond the largest number of the dtype becomes that number, but for an infinity where the dtype has it. A weight's noise depends on `seed`, on its name and on nothing else: the same strengths give
// the same bits. Comes before the first adapter.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_stack_set_rounding(struct lycore_stack *stack,
                                        int32_t rounding,
                                        uint32_t seed,
                                        struct lycore_error **error);

// The real weight `target`, of 8 bits, is `scale` times what is stored; so is what is written. 1 by default. Comes before the first adapter.
//
// # Safety
// `target` is a NUL-terminated UTF-8 string. `error` is NULL or may be written.
lycore_status lycore_stack_set_scale(struct lycore_stack *stack,
                                     const char *target,
                                     float scale,
                                     struct lycore_error **error);

// Whether every weight that gets its base back is compared with a checksum that was taken before it was first changed (`on` not 0; off by
// default). A difference is LYCORE_BACKEND with the names: something else wrote the weight or its copy. Costs a read of every changed weight, and
// the calls wait for it. Takes effect with the next copies.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_stack_self_check(struct lycore_stack *stack,
                                      int32_t on,
                                      struct lycore_error **error);

// What the stack holds and how it works, as JSON: {"device": "cuda:0", "executor": "kernels", "libtorch" or "cpu", "targets": n, "adapters": n,
// "backup": null before the first apply, else {"mode": "device", "host" or "compact", "why": text, "weights": n, "bytes": n}, "self_check": bool}.
// `json` becomes a text that the caller frees with lycore_text_free.
//
// # Safety
// `json` may be written. `error` is NULL or may be written.
lycore_status lycore_stack_info(struct lycore_stack *stack,
                                char **json,
                                struct lycore_error **error);

// Puts an adapter on the stack and gives it a number in `id`. `strengths` may be NULL: 1 everywhere. Takes effect with the next apply.
// An adapter of which no module finds its weight is LYCORE_KEY. The handle may be freed afterwards.
//
// # Safety
// `strengths` is NULL or points to a struct as described; `id` may be written. `error` is NULL or may be written.
lycore_status lycore_stack_add_adapter(struct lycore_stack *stack,
                                       const struct lycore_adapter *adapter,
                                       const struct lycore_strengths *strengths,
                                       uint64_t *id,
                                       struct lycore_error **error);

// Sets the strengths of adapter `id`. Takes effect with the next apply.
//
// # Safety
// `strengths` is NULL (1 everywhere) or points to a struct as described. `error` is NULL or may be written.
lycore_status lycore_stack_set_strengths(struct lycore_stack *stack,
                                         uint64_t id,
                                         const struct lycore_strengths *strengths,
                                         struct lycore_error **error);

// Takes adapter `id` off the stack. Takes effect with the next apply.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_stack_remove_adapter(struct lycore_stack *stack,
                                          uint64_t id,
                                          struct lycore_error **error);

// Writes every weight whose adapters or strengths changed: W' = W + sum of strength * delta(W), from the pristine W, summed in fp32 and
// rounded once. Progress counts weights. `stream` is a cudaStream_t for weights on a GPU (NULL and (void *)1: see the top of this file); the work
// is enqueued there and not waited for, except where copies of weights go to host memory. `applied` may be NULL.
// After an error or a cancel all weights are the base again.
//
// # Safety
// `progress` and `applied` are NULL or point to structs as described. `error` is NULL or may be written.
lycore_status lycore_stack_apply(struct lycore_stack *stack,
                                 void *stream,
                                 const struct lycore_progress *progress,
                                 struct lycore_applied *applied,
                                 struct lycore_error **error);

// Gives every weight its base back, bit for bit, and frees the copies. Adapters and strengths stay on the stack. `stream` as in apply.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_stack_restore(struct lycore_stack *stack,
                                   void *stream,
                                   struct lycore_error **error);

// The bypass: adds to `y` what the adapters add to the output of the layer with weight `target`, at the strengths as they are set, without
// touching the weight. (If they are merged into it too, they count twice. What they do to the layer's bias is not part of it: merge that into
// the bias.) Linear: x [.., in], y [.., out], `geometry` NULL. Convolution:
// x [batch, in, spatial..], y [batch, out, spatial..].
// Both row-major, on the same device. `stream` as in apply.
//
// # Safety
// `target` is a NUL-terminated UTF-8 string; `geometry` is NULL or points to a struct as described; `x` and `y` describe memory as said, which does
// not overlap. `error` is NULL or may be written.
lycore_status lycore_stack_forward(struct lycore_stack *stack,
                                   const char *target,
                                   const struct lycore_geometry *geometry,
                                   const struct lycore_tensor *x,
                                   const struct lycore_tensor *y,
                                   void *stream,
                                   struct lycore_error **error);

// The load report of adapter `id` as JSON: as lycore_adapter_report, with "matched" and "unmatched" in the summary, "target" in every
// module (null when it found none; a list when the model keeps apart what the module has in one; "slice": {"axis", "start", "length"} when it is
// a part), "bias" and "bias_slice" likewise where the module changes the layer's bias, and "nearest" beside unmatched keys. `json` becomes a
// text that the caller frees with lycore_text_free.
//
// # Safety
// `json` may be written. `error` is NULL or may be written.
lycore_status lycore_stack_report(struct lycore_stack *stack,
                                  uint64_t id,
                                  char **json,
                                  struct lycore_error **error);

// Frees the stack and its copies of weights; does not touch the weights, so restore first if they shall be the base. NULL is accepted; a
// second free returns LYCORE_BAD_HANDLE and does nothing.
lycore_status lycore_stack_free(struct lycore_stack *stack);

// Merges patches into one weight, in place, in one pass: for hosts that do their own bookkeeping of weights. `name` is used in errors; one that
// ends in ".bias" says that the weight is a layer's bias, and the patches do to it what they do to a bias.
// `stream` as in lycore_stack_apply. The patches' memory is not used after the call (on a GPU: after the enqueued work).
//
// # Safety
// `name` is a NUL-terminated UTF-8 string; `weight` describes memory that may be written; `patches` points to `count` structs as
// described. `error` is NULL or may be written.
lycore_status lycore_weight_merge(const char *name,
                                  const struct lycore_tensor *weight,
                                  const struct lycore_patch *patches,
                                  uint64_t count,
                                  void *stream,
                                  struct lycore_error **error);

// Merges adapters into a safetensors file and writes another, streaming: memory is bounded by the largest touched tensor, untouched
// tensors are the same bytes, metadata is kept and extended. `output` appears whole or not at all and may be `base` itself. Progress counts
// bytes.
//
// `options` is NULL or JSON: {"dtype": "keep" | "fp32" | "fp16" | "bf16" (of every fp32, fp16 and bf16 tensor; others pass through; default keep),
// "device": "cpu" | "cuda" | "cuda:N" (where to compute; default cpu), "other_families": bool (take adapters made for another family of models as
// far as they fit, rather than refuse them with LYCORE_KEY; default false)}.
// `report` may be NULL; it becomes JSON {"base", "output", "device", "bytes", "tensors": {"changed", "copied"}, "proven_equal": number of tensors that were read back and
// are the base's bit for bit, "adapters":
// [load report as of lycore_stack_report]}, freed with lycore_text_free.
//
// # Safety
// The texts are NUL-terminated UTF-8; `adapters` points to `count` handles; `adapter_strengths` is NULL (1 everywhere) or points to `count`
// structs; `progress` is NULL or as described; `report` and `error` are NULL or may be written.
lycore_status lycore_checkpoint_merge(const char *base,
                                      const struct lycore_adapter *const *adapters,
                                      const struct lycore_strengths *adapter_strengths,
                                      uint64_t count,
                                      const char *output,
                                      const char *options,
                                      const struct lycore_progress *progress,
                                      char **report,
                                      struct lycore_error **error);

// Writes an adapter in the spelling of another program. Values stay the same to the bit, metadata is kept; alphas go where the spelling keeps
// them. Weights that one layout has in one piece and the other in several are cut and put together by rows. What the spelling cannot say is
// LYCORE_UNSUPPORTED with every such module in the message, and nothing is written. `output` appears whole or not at all and may be the
// adapter's own file.
//
// `options` is JSON: {"to": "kohya" | "comfyui" | "diffusers" | "peft" (required), "family": the model's family as lycore_adapter_convert
// reports it (default: told from the names), "component": "unet" | "transformer" | "text_encoder" | "text_encoder_2" | "text_encoder_3"
// (writes only this model's modules; required for "peft" when the file has several), "skip": true (leaves out what cannot be said and lists
// it in the report)}. For "peft" `output` is a file, or a folder that gets adapter_model.safetensors; adapter_config.json is written beside it
// and never over that of another adapter. Progress counts modules.
// `report` may be NULL; it becomes JSON {"input", "output", "config": path or null, "to", "family": {"name", "reason"} or null, "summary":
// {"modules", "written", "tensors", "split", "fused", "left_out"}, "modules": [{"module", "becomes": [text]}], "left_out": [{"module",
// "reason"}]}, freed with lycore_text_free.
//
// # Safety
// The texts are NUL-terminated UTF-8; `progress` is NULL or as described; `report` and `error` are NULL or may be written.
lycore_status lycore_adapter_convert(const struct lycore_adapter *adapter,
                                     const char *output,
                                     const char *options,
                                     const struct lycore_progress *progress,
                                     char **report,
                                     struct lycore_error **error);

// A new network without modules. `config` is a JSON object, or TOML, with sd-scripts' names where it has them; lycore_network_schema tells
// all keys with their defaults. All problems of a config are reported at once.
//
// # Safety
// `config` is a NUL-terminated UTF-8 string. `out` may be written. `error` is NULL or may be written.
lycore_status lycore_network_new(const char *config,
                                 struct lycore_network **out,
                                 struct lycore_error **error);

// The keys of a network's config with their defaults, one per line. `text` is freed with lycore_text_free.
//
// # Safety
// `text` may be written. `error` is NULL or may be written.
lycore_status lycore_network_schema(char **text, struct lycore_error **error);

// The network's options as a JSON object, those that were not given with their defaults. `json` is freed with lycore_text_free.
//
// # Safety
// `json` may be written. `error` is NULL or may be written.
lycore_status lycore_network_config(const struct lycore_network *network,
                                    char **json,
                                    struct lycore_error **error);

// The qualified name, "namespace::module", of an operator of libtorch, for hosts that have libtorch's graph:
// `module(Tensor anchor, Tensor x, Tensor base, Tensor? weight, int network, int index, int axes, bool fresh) -> Tensor` gives
// base + what module `index` adds for x, and calls lycore_network_backward's work in the graph's backward. `anchor` is any tensor that requires a
// gradient; `base` is the layer's output; `weight` as in lycore_network_forward; `network` the lycore_network's address, alive until backward;
// `axes` the number of a convolution's spatial axes, else 0; `fresh` whether nobody else reads base, so that the result may take its memory.
// `text` is freed with lycore_text_free.
//
// # Safety
// `text` may be written. `error` is NULL or may be written.
lycore_status lycore_network_operator(char **text,
                                      struct lycore_error **error);

// Adds a module for a layer; its number goes to `index`: LYCORE_NO_MODULE where the config leaves the layer out. `name` is the layer's dotted
// path or a name as it shall stand in the file. Not after lycore_network_build.
//
// # Safety
// `name` is a NUL-terminated UTF-8 string; `layer` points to a struct as described; `index` may be written. `error` is NULL or may be
// written.
lycore_status lycore_network_add_layer(struct lycore_network *network,
                                       const char *name,
                                       const struct lycore_layer *layer,
                                       uint64_t *index,
                                       struct lycore_error **error);

// Whether module `index` computes with its layer's own weight (`needs` becomes true): then forward and backward must be given it.
//
// # Safety
// `needs` may be written. `error` is NULL or may be written.
lycore_status lycore_network_needs_weight(const struct lycore_network *network,
                                          uint64_t index,
                                          bool *needs,
                                          struct lycore_error **error);

// From here on T-LoRA computes with the first `share` of its ranks, above 0 and up to 1, in forward and backward: few for a noisy timestep,
// all at its end. Other algorithms do not look at it. The number lies on the device: a CUDA graph that was captured after the first call sees
// the later ones. After lycore_network_build.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_network_set_ranks(struct lycore_network *network,
                                       double share,
                                       void *stream,
                                       struct lycore_error **error);

// With `evaluating`, forward and backward leave nothing to chance (dropout, DyLoRA's choice of ranks) until they are told otherwise.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_network_evaluate(struct lycore_network *network,
                                      bool evaluating,
                                      struct lycore_error **error);

// Allocates parameters, gradients and optimizer state on `device` and initialises them from the config's seed.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_network_build(struct lycore_network *network,
                                   struct lycore_device device,
                                   struct lycore_error **error);

// y += what module `index` adds to its layer's output for x. x and y as in lycore_stack_forward, but of any strides (a norm: both as its
// input); fp32, fp16 or bf16. `weight` is the layer's own weight, or NULL where lycore_network_needs_weight says no. `stream` as in lycore_stack_apply.
//
// # Safety
// `x` and `y` describe memory that does not overlap; `weight` is NULL or describes memory. `error` is NULL or may be written.
lycore_status lycore_network_forward(struct lycore_network *network,
                                     uint64_t index,
                                     const struct lycore_tensor *x,
                                     const struct lycore_tensor *weight,
                                     const struct lycore_tensor *y,
                                     void *stream,
                                     struct lycore_error **error);

// The backward of lycore_network_forward: adds the gradients of the module's parameters to the network's, and, unless it is NULL, the
// gradient of x to `grad_x`. `x` and `weight` are the forward's, `grad_y` the gradient of its output; any strides.
//
// # Safety
// The tensors describe memory that does not overlap; `weight` and `grad_x` may be NULL. `error` is NULL or may be written.
lycore_status lycore_network_backward(struct lycore_network *network,
                                      uint64_t index,
                                      const struct lycore_tensor *x,
                                      const struct lycore_tensor *weight,
                                      const struct lycore_tensor *grad_y,
                                      const struct lycore_tensor *grad_x,
                                      void *stream,
                                      struct lycore_error **error);

// One optimizer step from the gradients summed so far: clip, update, clear. In the middle of an accumulation it only counts.
//
// With `out` it waits for the device and tells what it did. A gradient that is not finite is LYCORE_TRAIN; parameters, state and step count
// are then as before. With `out` NULL it tells nothing: such a gradient is cleared, nothing else changes, and lycore_network_results tells
// of it later. It does not wait then (optimizers other than those that lycore_network_hold takes do, for the norm).
//
// # Safety
// `out` is NULL or points to a struct whose struct_size is set. `error` is NULL or may be written.
lycore_status lycore_network_step(struct lycore_network *network,
                                  void *stream,
                                  struct lycore_step *out,
                                  struct lycore_error **error);

// What the last step did, and how many were left out since this was last told, by it or by lycore_network_step. Waits for all work on the
// device. `updated` is whether that step changed the parameters.
//
// # Safety
// `out` points to a struct whose struct_size is set. `error` is NULL or may be written.
lycore_status lycore_network_results(struct lycore_network *network,
                                     struct lycore_step *out,
                                     struct lycore_error **error);

// While a network is held, steps change nothing but the gradients, which they clear. For CUDA graphs:
//
// A whole step (forward, backward, lycore_network_step with `out` NULL on the capturing stream, once per micro-batch of the accumulation) can be
// captured, with every optimizer but Prodigy with a first beta of 0, on a GPU that the library has kernels for;
// LYCORE_UNSUPPORTED otherwise. The count of steps, the learning rate and whether a gradient is finite are kept on the device, so a
// replay is a step like any other. In this order: hold; run the step once or more, so that all that is made on first use is there; let go;
// capture; then before each launch lycore_network_prepare_replay, and lycore_network_results whenever something is to be told. Saving and
// loading may come between replays. The graph must not be launched once the network is freed.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_network_hold(struct lycore_network *network,
                                  bool held,
                                  void *stream,
                                  struct lycore_error **error);

// Tells that a captured graph in which the network does `updates` updates (at most 4096) is about to be launched on `stream`: makes sure that
// their learning rates are on the device. Waits for the stream once in some thousand updates. A replay that comes without it is left out once
// the rates are used up, and lycore_network_results says so.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_network_prepare_replay(struct lycore_network *network,
                                            uint64_t updates,
                                            void *stream,
                                            struct lycore_error **error);

// Clears the gradients, for example after a batch that shall not count.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_network_zero_gradients(struct lycore_network *network,
                                            void *stream,
                                            struct lycore_error **error);

// The flat buffer that `which` (LYCORE_BUFFER_*) names, fp32, one axis, on the network's device: for an all-reduce, or to look at. It is longer
// than lycore_network_parameter_count: parameters begin at aligned offsets, with zeros between them. Valid until the network is freed; its
// content changes with backward and step. After writing parameters call lycore_network_refresh.
//
// # Safety
// `out` may be written. `error` is NULL or may be written.
lycore_status lycore_network_buffer(struct lycore_network *network,
                                    int32_t which,
                                    struct lycore_tensor *out,
                                    struct lycore_error **error);

// Makes forward and backward see what the host wrote into the parameters of lycore_network_buffer (a broadcast, an average): with
// mixed_precision they read a copy in the compute dtype, which otherwise only a step refreshes.
//
// # Safety
// `error` is NULL or may be written.
lycore_status lycore_network_refresh(struct lycore_network *network,
                                     void *stream,
                                     struct lycore_error **error);

// How far the training is, for example after lycore_network_load_state: updates done, and calls of lycore_network_step since the last one
// (more than 0 in the middle of a gradient accumulation). Waits for the device if there were steps that nobody waited for.
//
// # Safety
// `steps` and `micro_steps` may be written. `error` is NULL or may be written.
lycore_status lycore_network_progress(const struct lycore_network *network,
                                      uint64_t *steps,
                                      uint64_t *micro_steps,
                                      struct lycore_error **error);

// Number of trainable parameters; 0 when `network` is not a live network.
uint64_t lycore_network_parameter_count(const struct lycore_network *network);

// Ends of epochs told to lycore_network_checkpoint, those before lycore_network_load_state too: a run that was stopped between the last step of an
// epoch and its end has one less than its steps say. 0 when `network` is not a live network.
uint64_t lycore_network_epochs(const struct lycore_network *network);

// Frees the network; what was not saved is gone. NULL is accepted; a second free returns LYCORE_BAD_HANDLE and does nothing.
lycore_status lycore_network_free(struct lycore_network *network);

// Writes the adapter as a kohya safetensors file with training metadata, whole or not at all. `which` is LYCORE_BUFFER_PARAMETERS or
// LYCORE_BUFFER_EMA; `dtype` is NULL (the config's save_precision) or
// "fp32", "fp16", "bf16"; `metadata` is NULL or a JSON object of texts to add. Two files of one state differ in their times only; the environment
// variable SOURCE_DATE_EPOCH stands for the clock.
//
// # Safety
// The texts are NULL or NUL-terminated UTF-8, `path` is not NULL. `error` is NULL or may be written.
lycore_status lycore_network_save(struct lycore_network *network,
                                  const char *path,
                                  int32_t which,
                                  const char *dtype,
                                  const char *metadata,
                                  struct lycore_error **error);

// Writes the files that the config's output_dir, save_every_n_steps and so on make due at this `moment` (LYCORE_MOMENT_*), whole or not at all,
// and deletes those that they put out of date. Call it after each lycore_network_step, at the end of each epoch and at the end of all; the epochs
// are counted by it. `value` is a loss or validation value of the parameters as they are, or NaN: the least so far is the best. Where several
// processes train together, one of them calls it. Nothing is due without output_dir; then the end is LYCORE_TRAIN.
//
// A file that cannot be written is LYCORE_FILE: older files stay, and training can go on. Only files are deleted that this run wrote, or the run
// whose state it loaded. `report` may be NULL; it becomes JSON {"step", "epoch", "best": number or null, "written": [path], "deleted": [path],
// "left": [{"file", "reason"}] (what should have been deleted but was not)}, freed with lycore_text_free.
//
// # Safety
// `report` and `error` are NULL or may be written.
lycore_status lycore_network_checkpoint(struct lycore_network *network,
                                        int32_t moment,
                                        double value,
                                        void *stream,
                                        char **report,
                                        struct lycore_error **error);

// The adapter as it is now, as lycore_network_save would write it, with its own memory: it stays while training goes on, and a stack takes it as
// any other. Freed with lycore_adapter_free.
//
// # Safety
// `out` may be written. `error` is NULL or may be written.
lycore_status lycore_network_adapter(struct lycore_network *network,
                                     void *stream,
                                     struct lycore_adapter **out,
                                     struct lycore_error **error);

// Writes everything that a resumed run needs to go on bit for bit: parameters, optimizer state, step, accumulated gradients. Whole or not
// at all. The order of the data is the host's.
//
// # Safety
// `path` is a NUL-terminated UTF-8 string. `error` is NULL or may be written.
lycore_status lycore_network_save_state(struct lycore_network *network,
                                        const char *path,
                                        struct lycore_error **error);

// Reads what lycore_network_save_state wrote, into a built network of the same modules and config; another one's state is refused.
//
// # Safety
// `path` is a NUL-terminated UTF-8 string. `error` is NULL or may be written.
lycore_status lycore_network_load_state(struct lycore_network *network,
                                        const char *path,
                                        struct lycore_error **error);

// Starts from an adapter file instead of a fresh initialisation; `loaded` (may be NULL) tells how many modules were found in it.
//
// # Safety
// `path` is a NUL-terminated UTF-8 string; `loaded` and `error` are NULL or may be written.
lycore_status lycore_network_load_weights(struct lycore_network *network,
                                          const char *path,
                                          uint64_t *loaded,
                                          struct lycore_error **error);

// Writes an adapter file with fewer ranks: every LoRA and LoCon becomes the nearest one of a lower rank, its scale stays. What would not
// become smaller, and other algorithms, are copied bit for bit, so that the output is never larger than `source` (but for `convert`).
// `output` appears whole or not at all and may be `source` itself. Progress counts modules.
//
// `options` is JSON: {"rank": the most ranks of a module (needed by method fixed), "conv_rank": of a convolution (default: rank),
// "method": "fixed" | "sv_ratio" | "sv_cumulative" | "sv_fro" (default fixed; the others are sd-scripts' dynamic methods),
// "param": the number of a dynamic method, "dtype": "keep" | "fp32" | "fp16" | "bf16" (of the new factors; default keep),
// "convert": true | false (LoHa and LoKr become LoRA, exact where the rank allows, else the nearest; default false)}.
// `report` may be NULL; it becomes JSON {"source", "output", "method", "bytes": {"source", "output"}, "summary": {"modules", "resized",
// "copied"}, "modules": [{"module", "algorithm", "status": "resized" | "converted" | "copied", "reason" (of a copy), "old_rank", "new_rank",
// "new_alpha", "sum_retained", "fro_retained" (shares of the singular values' sum and of the Frobenius norm), "error" (relative Frobenius
// distance of the old to the new delta, with its rounding into the dtype), "note"}]}, freed with lycore_text_free.
//
// # Safety
// The texts are NUL-terminated UTF-8; `progress` is NULL or as described; `report` and `error` are NULL or may be written.
lycore_status lycore_resize(const char *source,
                            const char *output,
                            const char *options,
                            const struct lycore_progress *progress,
                            char **report,
                            struct lycore_error **error);

// Writes the weighted sum of `count` adapter files as one: dW = sum of weight * dW of each, whatever their algorithms and spellings; negative
// weights subtract, files of weight 0 take no part. One file of weight 1 is copied byte for byte. `output` appears whole or not at all and
// may be one of the files. Progress counts modules.
//
// `options` is NULL or JSON: {"method": "concat" (default; exact, the ranks add up) | "svd" (the exact sum, cut to rank) | "linear" (PEFT's: factors
// of equal ranks are added, with cross terms) | "ties" | "dare" | "magnitude_prune", "rank": of svd (needed) and of the last three (without it
// they write whole differences), "conv_rank": of convolutions (default: rank), "density": the share of elements that the last three keep
// (needed), "seed": of dare (default 0), "dtype": "keep" | "fp32" | "fp16" | "bf16" (of the new tensors; default keep: that of a module's parts,
// fp32 where they differ)}.
// Modules that depend on the weight that they change (DoRA, OFT, IA3, ..) are copied where they are alone at weight 1; else the call fails and
// names the module.
// `report` may be NULL; it becomes JSON {"output", "method", "bytes", "summary": {"modules", "shared" (of more than one file)}, "sources":
// [{"file", "weight", "bytes", "modules", "left_out": keys that belong to no module}], "modules": [{"module", "from": numbers of the files,
// "form": "copied" | "scaled" | "concatenated" | "linear" | "cut" | "whole" | "bias", "rank", "error" (of "cut": relative Frobenius
// distance)}]}, freed with lycore_text_free.
//
// # Safety
// `sources` points to `count` texts; `weights` is NULL (1 everywhere) or points to `count` numbers; the rest as for lycore_resize.
lycore_status lycore_combine(const char *const *sources,
                             const double *weights,
                             uint64_t count,
                             const char *output,
                             const char *options,
                             const struct lycore_progress *progress,
                             char **report,
                             struct lycore_error **error);

// Writes what the checkpoint `tuned` has beyond `base` as a LoRA: the difference of every Linear and convolution weight that both have, of
// the diffusion model and of text encoders, cut to a rank. `output` appears whole or not at all. Progress counts weights.
//
// `options` is JSON: {"rank": the most ranks of a module, "conv_rank": of a convolution with a kernel above 1 (default: rank), "energy": 0 to 1 (the
// smallest rank that keeps this share of a difference's squared norm is taken; default: the rank as given), "min_diff": weights of which
// no value differs by more are left out (default 0), "dtype": "keep" | "fp32" | "fp16" | "bf16" (default keep: that of the tuned weight),
// "norms": true | false (norms and biases too, as they are; default false), "spelling": "kohya" | "checkpoint" (names of the modules;
// default kohya)}.
// `report` may be NULL; it becomes JSON {"tuned", "base", "output", "bytes", "summary": {"weights", "modules", "unchanged", "skipped"}, "modules":
// [{"module", "weight", "rank", "error" (relative Frobenius distance, with the rounding)}], "skipped": [{"weight", "reason"}]}, freed with
// lycore_text_free.
//
// # Safety
// As for lycore_resize.
lycore_status lycore_extract(const char *tuned,
                             const char *base,
                             const char *output,
                             const char *options,
                             const struct lycore_progress *progress,
                             char **report,
                             struct lycore_error **error);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* LYCORE_H */
