// The frame of misuse.c and misuse_order.c: how a failing call is checked, and the good halves of the calls.
#ifndef MISUSE_H
#define MISUSE_H

#define _POSIX_C_SOURCE 200809L
#define CHECK_CONTINUE
#include "check.h"
#include "fixture.h"

#include <sys/stat.h>
#include <unistd.h>

static lycore_error *error = NULL;
// What the calls below pass as their last argument.
static lycore_error **e = NULL;

static inline void check_failure(lycore_status got, lycore_status want, lycore_status or_want, const char *text, const char *file, int line) {
    check_count++;
    if (got != want && got != or_want) {
        printf("%s:%d: %s: got \"%s\", want \"%s\": %s\n", file, line, text, lycore_status_text(got), lycore_status_text(want),
               got == LYCORE_OK || e == NULL ? "" : lycore_error_message(error));
        check_failed();
    }
    if (e == NULL) return;
    if (got == LYCORE_OK) {
        CHECK(error == NULL);
        return;
    }
    CHECK_EQUAL(lycore_error_status(error), got);
    CHECK(lycore_error_message(error)[0] != '\0');
    CHECK(lycore_error_hint(error) != NULL && lycore_error_key(error) != NULL && lycore_error_file(error) != NULL);
    CHECK_EQUAL(lycore_error_free(error), LYCORE_OK);
    CHECK_EQUAL(lycore_error_free(error), LYCORE_BAD_HANDLE);
}

// `call` must fail with `want`, and again when nobody takes the error. A pointer that the library must overwrite stands in `error` before.
#define FAILS_OR(want, or_want, call)                                  \
    do {                                                               \
        error = (lycore_error *)(uintptr_t)0x10;                       \
        e = &error;                                                    \
        check_failure(call, want, or_want, #call, __FILE__, __LINE__);           \
        e = NULL;                                                      \
        check_failure(call, want, or_want, #call, __FILE__, __LINE__);           \
    } while (0)
#define FAILS(want, call) FAILS_OR(want, want, call)
// A build without training may say so before it looks at the arguments.
#define FAILS_NETWORK(want, call) FAILS_OR(want, training ? (want) : LYCORE_UNSUPPORTED, call)
// `call` must succeed, and set `error` to NULL.
#define WORKS(call)                                                                                \
    do {                                                                                           \
        error = (lycore_error *)(uintptr_t)0x10;                                                   \
        e = &error;                                                                                \
        check_ok(call, &error, #call, __FILE__, __LINE__);                                         \
    } while (0)

// Places for results. A call that fails must leave them as they are; `untouched` looks.
static struct places {
    lycore_adapter *adapter;
    lycore_stack *stack;
    lycore_network *network;
    lycore_cancel *cancel;
    char *text;
    const char *name;
    uint64_t number;
    lycore_module module;
    lycore_tensor tensor;
    lycore_applied applied;
    lycore_step step;
} out, out_before;

static inline void set_places(void) {
    memset(&out, 0x5a, sizeof out);
    out.module.struct_size = sizeof out.module;
    out.applied.struct_size = sizeof out.applied;
    out.step.struct_size = sizeof out.step;
    memcpy(&out_before, &out, sizeof out);
}
#define UNTOUCHED()                               \
    do {                                          \
        CHECK_BYTES(&out, &out_before, sizeof out); \
        set_places();                             \
    } while (0)

static char folder[64];

static inline const char *path_of(const char *name) {
    static char paths[2][128];
    static int turn = 0;
    turn = 1 - turn;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", folder, name);
    return paths[turn];
}

static inline bool exists(const char *path) {
    struct stat info;
    return lstat(path, &info) == 0;
}

// What the good halves of the calls use. Paths are kept, since path_of forgets them.
static bool training, gpu;
static lycore_adapter *adapter;
static lycore_stack *stack;
static lycore_network *network;
static char adapter_path[128], base_path[128], output_path[128];
static float weight_data[48], weight_base[48], x_data[4 * 3 * 8 * 8], y_data[4 * 4 * 8 * 8], conv_data[108], conv_base[108];
static int64_t weight_shape[2] = {8, 6}, x_shape[2] = {2, 6}, y_shape[2] = {2, 8};
static int64_t conv_shape[4] = {4, 3, 3, 3}, conv_x_shape[4] = {1, 3, 5, 5}, conv_y_shape[4] = {1, 4, 3, 3};
static lycore_tensor weight, x, y, conv, conv_x, conv_y;
static const char not_utf8[] = "blocks.\xff\xfe";

static inline lycore_tensor tensor_of(float *data, int32_t ndim, int64_t *shape) {
    lycore_tensor tensor = {.data = data, .device = {LYCORE_DEVICE_CPU, 0}, .ndim = ndim, .shape = shape};
    tensor.dtype.code = LYCORE_DTYPE_FLOAT;
    tensor.dtype.bits = 32;
    tensor.dtype.lanes = 1;
    return tensor;
}

static inline void weights_are_the_base(void) {
    CHECK_BYTES(weight_data, weight_base, sizeof weight_data);
    CHECK_BYTES(conv_data, conv_base, sizeof conv_data);
}

static inline lycore_patch patch_of(const char *const *names, const lycore_tensor *tensors, uint64_t count) {
    lycore_patch patch = {.struct_size = sizeof patch, .count = count, .names = names, .tensors = tensors, .strength = 1.0};
    return patch;
}

static const char *const slots[3] = {"lora_up.weight", "lora_down.weight", "alpha"};
static lycore_tensor factors[3];
static int64_t up_shape[2] = {8, 2}, down_shape[2] = {2, 6};

static inline lycore_network *new_network(bool with_module, bool built) {
    lycore_network *made = NULL;
    uint64_t index;
    const lycore_device cpu = {LYCORE_DEVICE_CPU, 0};
    WORKS(lycore_network_new("{\"network_dim\": 2}", &made, e));
    if (with_module) WORKS(add_layer(made, "blocks.0.proj", weight_shape, 2, NULL, &index, e));
    if (built) WORKS(lycore_network_build(made, cpu, e));
    return made;
}

static inline bool go_on(void *user_data, uint64_t done, uint64_t total) {
    (void)user_data, (void)done, (void)total;
    return true;
}
static inline bool stop(void *user_data, uint64_t done, uint64_t total) {
    (void)user_data, (void)done, (void)total;
    return false;
}

// Opens everything, in a folder of this run.
static inline void prepare(void) {
    const char *temporary = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/lycore-misuse-XXXXXX", temporary != NULL && strlen(temporary) < 32 ? temporary : "/tmp");
    if (mkdtemp(folder) == NULL) st_die("cannot be made", folder);
    char *json = NULL;
    uint64_t id;
    WORKS(lycore_capabilities(&json, e));
    training = strstr(json, "\"training\":true") != NULL;
    gpu = strstr(json, "\"devices\":0") == NULL;
    CHECK_EQUAL(lycore_text_free(json), LYCORE_OK);
    fixture_make();
    snprintf(adapter_path, sizeof adapter_path, "%s", path_of("adapter.safetensors"));
    snprintf(base_path, sizeof base_path, "%s", path_of("base.safetensors"));
    snprintf(output_path, sizeof output_path, "%s", path_of("output.safetensors"));
    fixture_write(adapter_path);
    fixture_fill(weight_data, 48);
    fixture_fill(conv_data, 108);
    memcpy(weight_base, weight_data, sizeof weight_data);
    memcpy(conv_base, conv_data, sizeof conv_data);
    const st_tensor tensors[] = {{layers[PROJ].target, "F32", 2, {8, 6}, weight_data}};
    st_write(base_path, tensors, 1);
    weight = tensor_of(weight_data, 2, weight_shape);
    x = tensor_of(x_data, 2, x_shape);
    y = tensor_of(y_data, 2, y_shape);
    conv = tensor_of(conv_data, 4, conv_shape);
    conv_x = tensor_of(x_data, 4, conv_x_shape);
    conv_y = tensor_of(y_data, 4, conv_y_shape);
    factors[0] = tensor_of(layers[PROJ].up, 2, up_shape);
    factors[1] = tensor_of(layers[PROJ].down, 2, down_shape);
    factors[2] = tensor_of(&layers[PROJ].alpha, 0, NULL);

    WORKS(lycore_adapter_open(adapter_path, &adapter, e));
    WORKS(lycore_stack_new(LYCORE_BACKUP_DEVICE, &stack, e));
    WORKS(lycore_stack_add_target(stack, layers[PROJ].target, &weight, e));
    WORKS(lycore_stack_add_target(stack, layers[CONV].target, &conv, e));
    WORKS(lycore_stack_add_adapter(stack, adapter, NULL, &id, e));
    if (training) network = new_network(true, true);
    set_places();
}

// After all of the misuse everything works as ever, and the folder holds what was put there.
static inline int finish(const char *program) {
    WORKS(lycore_stack_apply(stack, NULL, NULL, NULL, e));
    CHECK(memcmp(weight_data, weight_base, sizeof weight_data) != 0);
    WORKS(lycore_stack_restore(stack, NULL, e));
    weights_are_the_base();
    CHECK_EQUAL(lycore_network_free(network), LYCORE_OK);
    CHECK_EQUAL(lycore_stack_free(stack), LYCORE_OK);
    CHECK_EQUAL(lycore_adapter_free(adapter), LYCORE_OK);
    CHECK_EQUAL(unlink(adapter_path), 0);
    CHECK_EQUAL(unlink(base_path), 0);
    CHECK_EQUAL(rmdir(folder), 0);
    return check_end(program);
}

#endif
