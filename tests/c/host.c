// A host in C, from top to bottom: open an adapter, put it on weights, change its strength, take it off, run it beside the weights, merge it
// into a file, train one. Every result is compared with the formula computed here in double.
//
// `host` works in host memory; `host cuda` does the part with the stack on the first GPU as well, if there is one.

#define _POSIX_C_SOURCE 200809L
#include "check.h"
#include "fixture.h"

#include <dlfcn.h>
#include <stddef.h>
#include <unistd.h>

// Every call of the library that can fail takes the address of one of these last; CHECK_OK prints what it says.
static lycore_error *error = NULL;

static char folder[64];

// A path in this run's own folder. Two at a time.
static const char *path_of(const char *name) {
    static char paths[2][128];
    static int turn = 0;
    turn = 1 - turn;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", folder, name);
    return paths[turn];
}

// ---- Which library is this? ----------------------------------------------------------------------------------------------------------

// A program is compiled with a header and runs with a library, and the two may come from different releases: a host asks first.
static void versions(void) {
    char text[32];
    snprintf(text, sizeof text, "%d.%d.%d", LYCORE_VERSION_MAJOR, LYCORE_VERSION_MINOR, LYCORE_VERSION_PATCH);
    CHECK_TEXT(lycore_version(), text);
    CHECK_EQUAL(lycore_version_number(), LYCORE_VERSION_MAJOR * 1000000 + LYCORE_VERSION_MINOR * 1000 + LYCORE_VERSION_PATCH);

    CHECK_TEXT(lycore_status_text(LYCORE_OK), "ok");
    CHECK_TEXT(lycore_status_text(12345), "unknown status");

    // lycore_tensor is DLPack's DLTensor, so that a host that speaks DLPack passes its own by a cast.
    struct dl_tensor {
        void *data;
        struct { int32_t device_type, device_id; } device;
        int32_t ndim;
        struct { uint8_t code, bits; uint16_t lanes; } dtype;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    };
    CHECK_EQUAL(sizeof(lycore_tensor), sizeof(struct dl_tensor));
    CHECK_EQUAL(offsetof(lycore_tensor, device), offsetof(struct dl_tensor, device));
    CHECK_EQUAL(offsetof(lycore_tensor, ndim), offsetof(struct dl_tensor, ndim));
    CHECK_EQUAL(offsetof(lycore_tensor, dtype), offsetof(struct dl_tensor, dtype));
    CHECK_EQUAL(offsetof(lycore_tensor, shape), offsetof(struct dl_tensor, shape));
    CHECK_EQUAL(offsetof(lycore_tensor, strides), offsetof(struct dl_tensor, strides));
    CHECK_EQUAL(offsetof(lycore_tensor, byte_offset), offsetof(struct dl_tensor, byte_offset));
}

// Whether this build trains and whether it sees a GPU. The answer is JSON; a real host would parse it.
static void capabilities(bool *training, bool *gpu) {
    char *json = NULL;
    CHECK_OK(lycore_capabilities(&json, &error));
    CHECK_CONTAINS(json, lycore_version());
    CHECK_CONTAINS(json, "\"algorithms\"");
    *training = strstr(json, "\"training\":true") != NULL;
    *gpu = strstr(json, "\"devices\":0") == NULL;
    printf("library: %s\n", json);
    CHECK_EQUAL(lycore_text_free(json), LYCORE_OK);
}

// ---- An adapter ----------------------------------------------------------------------------------------------------------------------

// The same modules, whether from a file or from memory; module by module, tensor by tensor, the bytes that were written.
static void look_into(const lycore_adapter *adapter) {
    CHECK_EQUAL(lycore_adapter_module_count(adapter), LAYERS);
    for (uint64_t m = 0; m < LAYERS; m++) {
        lycore_module module = {.struct_size = sizeof module};
        CHECK_OK(lycore_adapter_module(adapter, m, &module, &error));
        const layer *l = layers;
        while (l < layers + LAYERS && strcmp(l->module, module.name) != 0) l++;
        CHECK(l < layers + LAYERS);
        CHECK_TEXT(module.algorithm, l->ndim == 4 ? "LoCon" : "LoRA");
        CHECK_EQUAL(module.rank, l->rank);
        CHECK_NEAR(module.alpha, l->alpha == 0.0f ? (double)l->rank : (double)l->alpha, 0.0);
        CHECK_EQUAL(module.tensor_count, 2 + l->tucker + (l->alpha != 0.0f));
        for (uint64_t t = 0; t < module.tensor_count; t++) {
            const char *name = NULL;
            lycore_tensor tensor;
            CHECK_OK(lycore_adapter_tensor(adapter, m, t, &name, &tensor, &error));
            CHECK_EQUAL(tensor.device.device_type, LYCORE_DEVICE_CPU);
            CHECK(tensor.dtype.code == LYCORE_DTYPE_FLOAT && tensor.dtype.bits == 32 && tensor.dtype.lanes == 1);
            const float *want = strcmp(name, "lora_up.weight") == 0 ? l->up
                : strcmp(name, "lora_down.weight") == 0             ? l->down
                : strcmp(name, "lora_mid.weight") == 0              ? l->mid
                                                                    : &l->alpha;
            size_t count = 1;
            for (int32_t axis = 0; axis < tensor.ndim; axis++) count *= (size_t)tensor.shape[axis];
            CHECK_EQUAL(tensor.ndim, want == &l->alpha ? 0 : l->ndim);
            CHECK_BYTES((char *)tensor.data + tensor.byte_offset, want, 4 * count);
        }
    }
}

static lycore_adapter *open_adapter(void) {
    size_t size;
    unsigned char *bytes = fixture_encode(&size);
    st_write_bytes(path_of("adapter.safetensors"), bytes, size);

    lycore_adapter *adapter = NULL, *copy = NULL;
    CHECK_OK(lycore_adapter_open_memory(bytes, size, &copy, &error));
    // The library made its own copy of the bytes.
    memset(bytes, 0, size);
    free(bytes);
    look_into(copy);
    CHECK_EQUAL(lycore_adapter_free(copy), LYCORE_OK);

    CHECK_OK(lycore_adapter_open(path_of("adapter.safetensors"), &adapter, &error));
    look_into(adapter);

    char *report = NULL;
    CHECK_OK(lycore_adapter_report(adapter, &report, &error));
    CHECK_CONTAINS(report, "\"modules\":5");
    CHECK_CONTAINS(report, "\"readable\":15");
    CHECK_CONTAINS(report, "\"written_by\":\"tests/c\"");
    CHECK_EQUAL(lycore_text_free(report), LYCORE_OK);

    // Saving gives a file that opens as the same adapter.
    CHECK_OK(lycore_adapter_save(adapter, path_of("saved.safetensors"), &error));
    CHECK_OK(lycore_adapter_open(path_of("saved.safetensors"), &copy, &error));
    look_into(copy);
    CHECK_EQUAL(lycore_adapter_free(copy), LYCORE_OK);
    return adapter;
}

// ---- Weights: host memory or a GPU's ---------------------------------------------------------------------------------------------------

// Where the weights of the next part are.
typedef struct memory {
    const char *name;
    lycore_device device;
    void *(*allocate)(size_t size);
    void (*release)(void *data);
    void (*upload)(void *to, const void *from, size_t size);
    void (*download)(void *to, const void *from, size_t size);
} memory;

static void copy_bytes(void *to, const void *from, size_t size) { memcpy(to, from, size); }

static const memory host_memory = {"host memory", {LYCORE_DEVICE_CPU, 0}, malloc, free, copy_bytes, copy_bytes};

// The CUDA runtime, opened by name: this program needs neither its headers nor its presence.
static struct {
    int (*get_device_count)(int *);
    int (*malloc)(void **, size_t);
    int (*free)(void *);
    int (*memcpy)(void *, const void *, size_t, int);
    int (*device_synchronize)(void);
} cuda;

static void *cuda_allocate(size_t size) {
    void *data = NULL;
    CHECK_EQUAL(cuda.malloc(&data, size), 0);
    return data;
}
static void cuda_release(void *data) { CHECK_EQUAL(cuda.free(data), 0); }
static void cuda_upload(void *to, const void *from, size_t size) {
    CHECK_EQUAL(cuda.memcpy(to, from, size, 1), 0);
    // The copy may still be on its way, and the library works on a stream of its own choice.
    CHECK_EQUAL(cuda.device_synchronize(), 0);
}
static void cuda_download(void *to, const void *from, size_t size) {
    // The library enqueues its work and does not wait for it.
    CHECK_EQUAL(cuda.device_synchronize(), 0);
    CHECK_EQUAL(cuda.memcpy(to, from, size, 2), 0);
}

static const memory gpu_memory = {"GPU memory", {LYCORE_DEVICE_CUDA, 0}, cuda_allocate, cuda_release, cuda_upload, cuda_download};

static bool open_cuda(void) {
    // With the number that the torch of this machine brings, or the other one.
    void *library = dlopen("libcudart.so.13", RTLD_NOW);
    if (library == NULL) library = dlopen("libcudart.so.12", RTLD_NOW);
    if (library == NULL) return false;
    // ISO C has no conversion from void * to a function pointer; POSIX says that they have the same bytes.
    const struct { const char *name; void *slot; } symbols[] = {
        {"cudaGetDeviceCount", &cuda.get_device_count}, {"cudaMalloc", &cuda.malloc}, {"cudaFree", &cuda.free},
        {"cudaMemcpy", &cuda.memcpy}, {"cudaDeviceSynchronize", &cuda.device_synchronize},
    };
    for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
        void *symbol = dlsym(library, symbols[i].name);
        if (symbol == NULL) return false;
        memcpy(symbols[i].slot, &symbol, sizeof symbol);
    }
    int devices = 0;
    return cuda.get_device_count(&devices) == 0 && devices > 0;
}

// A row-major fp32 tensor. The library keeps no pointer to the descriptor or to `shape`.
static lycore_tensor tensor_of(const memory *place, void *data, int32_t ndim, int64_t *shape) {
    lycore_tensor tensor = {.data = data, .device = place->device, .ndim = ndim, .shape = shape};
    tensor.dtype.code = LYCORE_DTYPE_FLOAT;
    tensor.dtype.bits = 32;
    tensor.dtype.lanes = 1;
    return tensor;
}

// A weight of the host's model: `bytes` of memory at `data`, and what they held at first.
typedef struct weight {
    lycore_tensor tensor;
    int64_t shape[4], strides[2];
    void *data;
    size_t bytes;
    unsigned char base[8 * MAX_ELEMENTS];
} weight;

enum { FUSED_ROWS = 12, FUSED_STRIDE = 8, FUSED_START = 4 };

// Makes the weight for layer `i` and describes it: fp32 and packed, except that HALF is bf16 and that the rows of FUSED lie 8 elements apart
// (with two that belong to somebody else between them).
static void make_weight(weight *w, int i, const memory *place) {
    const layer *l = &layers[i];
    float values[2 * MAX_ELEMENTS];
    int64_t rows = l->shape[0], stride = fixture_columns(l);
    memcpy(w->shape, l->shape, sizeof w->shape);
    w->tensor = tensor_of(place, NULL, l->ndim, w->shape);
    if (i == FUSED) {
        rows = w->shape[0] = FUSED_ROWS;
        stride = w->strides[0] = FUSED_STRIDE;
        w->strides[1] = 1;
        w->tensor.strides = w->strides;
    }
    fixture_fill(values, rows * stride);
    w->bytes = 4 * (size_t)(rows * stride);
    memcpy(w->base, values, w->bytes);
    if (i == HALF) {
        w->bytes /= 2;
        w->tensor.dtype.code = LYCORE_DTYPE_BFLOAT;
        w->tensor.dtype.bits = 16;
        for (int64_t k = 0; k < rows * stride; k++) ((uint16_t *)(void *)w->base)[k] = bf16_from_double((double)values[k]);
    }
    w->data = w->tensor.data = place->allocate(w->bytes);
    place->upload(w->data, w->base, w->bytes);
}

// Compares a weight, element by element, with base + strength * delta.
static void expect_weight(const weight *w, int i, const memory *place, double strength) {
    const layer *l = &layers[i];
    double delta[MAX_ELEMENTS];
    unsigned char now[sizeof w->base];
    fixture_delta(l, delta);
    place->download(now, w->data, w->bytes);
    if (strength == 0.0) {
        CHECK_BYTES(now, w->base, w->bytes);
        return;
    }
    const int64_t columns = fixture_columns(l), stride = i == FUSED ? FUSED_STRIDE : columns;
    for (int64_t row = 0; row < w->shape[0]; row++) {
        for (int64_t column = 0; column < stride; column++) {
            const int64_t at = row * stride + column, of = i == FUSED ? row - FUSED_START : row;
            if (of < 0 || of >= l->shape[0] || column >= columns) {
                // Outside of the slice and between the rows: not touched.
                CHECK_BYTES(now + 4 * at, w->base + 4 * at, 4);
                continue;
            }
            const double d = strength * delta[of * columns + column];
            if (i == HALF) {
                // The sum is rounded once, to nearest even: to the very bit.
                uint16_t before, after;
                memcpy(&before, w->base + 2 * at, 2);
                memcpy(&after, now + 2 * at, 2);
                CHECK_EQUAL(after, bf16_from_double((double)bf16_to_float(before) + d));
            } else {
                float before, after;
                memcpy(&before, w->base + 4 * at, 4);
                memcpy(&after, now + 4 * at, 4);
                // fp32 rounds products and sum by 6e-8 each; relative to the summands, since the sum may cancel.
                CHECK_NEAR((double)after, (double)before + d, 1e-6 * (fabs((double)before) + fabs(d)));
            }
        }
    }
}

// ---- The stack: weights, adapters, strengths -------------------------------------------------------------------------------------------

typedef struct counted { uint64_t calls, done, total; } counted;

// Progress goes up to its total and never back.
static bool count(void *user_data, uint64_t done, uint64_t total) {
    counted *c = (counted *)user_data;
    CHECK(done >= c->done && done <= total && (c->calls == 0 || total == c->total));
    c->calls++;
    c->done = done;
    c->total = total;
    return true;
}

// Convolves in double: x [2, 3, 7, 6] with delta [4, 3, 3, 3], stride 2, padding 1.
static double convolved(const float *x, const double *delta, int64_t n, int64_t o, int64_t row, int64_t column) {
    double sum = 0.0;
    for (int64_t c = 0; c < 3; c++) {
        for (int64_t kr = 0; kr < 3; kr++) {
            for (int64_t kc = 0; kc < 3; kc++) {
                const int64_t r = 2 * row - 1 + kr, k = 2 * column - 1 + kc;
                if (r < 0 || r >= 7 || k < 0 || k >= 6) continue;
                sum += delta[((o * 3 + c) * 3 + kr) * 3 + kc] * (double)x[((n * 3 + c) * 7 + r) * 6 + k];
            }
        }
    }
    return sum;
}

// The bypass: what the adapter adds to a layer's output, computed from the layer's input while the weight stays as it is.
static void bypass(lycore_stack *stack, const memory *place, double strength) {
    enum { X = 2 * 3 * 7 * 6, Y = 2 * 4 * 4 * 3 };
    float x[X], y[Y], after[Y];
    double delta[MAX_ELEMENTS];
    void *x_data = place->allocate(sizeof x), *y_data = place->allocate(sizeof y);

    // A Linear layer takes any number of leading axes.
    int64_t x_shape[4] = {2, 3, 6}, y_shape[4] = {2, 3, 8};
    lycore_tensor x_tensor = tensor_of(place, x_data, 3, x_shape), y_tensor = tensor_of(place, y_data, 3, y_shape);
    fixture_fill(x, 6 * 6);
    fixture_fill(y, 6 * 8);
    place->upload(x_data, x, sizeof x);
    place->upload(y_data, y, sizeof y);
    CHECK_OK(lycore_stack_forward(stack, layers[PROJ].target, NULL, &x_tensor, &y_tensor, NULL, &error));
    place->download(after, y_data, sizeof after);
    fixture_delta(&layers[PROJ], delta);
    for (int64_t n = 0; n < 6; n++) {
        for (int64_t o = 0; o < 8; o++) {
            double added = 0.0;
            for (int64_t i = 0; i < 6; i++) added += delta[o * 6 + i] * (double)x[n * 6 + i];
            CHECK_NEAR((double)after[n * 8 + o], (double)y[n * 8 + o] + strength * added, 2e-6);
        }
    }

    // A convolution also needs to know how it slides.
    const int64_t stride[2] = {2, 2}, padding[2] = {1, 1};
    const lycore_geometry geometry = {.struct_size = sizeof geometry, .axes = 2, .stride = stride, .padding = padding};
    const int64_t conv_x[4] = {2, 3, 7, 6}, conv_y[4] = {2, 4, 4, 3};
    memcpy(x_shape, conv_x, sizeof conv_x);
    memcpy(y_shape, conv_y, sizeof conv_y);
    x_tensor.ndim = y_tensor.ndim = 4;
    fixture_fill(x, X);
    fixture_fill(y, Y);
    place->upload(x_data, x, sizeof x);
    for (int i = CONV; i <= TUCKER; i++) {
        place->upload(y_data, y, sizeof y);
        CHECK_OK(lycore_stack_forward(stack, layers[i].target, &geometry, &x_tensor, &y_tensor, NULL, &error));
        place->download(after, y_data, sizeof after);
        fixture_delta(&layers[i], delta);
        for (int64_t at = 0; at < Y; at++) {
            const double added = convolved(x, delta, at / 48, at / 12 % 4, at / 3 % 4, at % 3);
            CHECK_NEAR((double)after[at], (double)y[at] + strength * added, 5e-6);
        }
    }
    place->release(x_data);
    place->release(y_data);
}

static void stack_part(lycore_adapter *adapter, const memory *place) {
    lycore_stack *stack = NULL;
    weight weights[LAYERS];
    uint64_t id = 0;
    CHECK_OK(lycore_stack_new(LYCORE_BACKUP_DEVICE, &stack, &error));
    for (int i = 0; i < LAYERS; i++) {
        make_weight(&weights[i], i, place);
        CHECK_OK(lycore_stack_add_target(stack, layers[i].target, &weights[i].tensor, &error));
    }
    // No rule of the library knows that this host's `qkv` holds k in its second third.
    const lycore_slice slice = {.axis = 0, .start = FUSED_START, .length = 4};
    CHECK_OK(lycore_stack_add_alias(stack, layers[FUSED].module, layers[FUSED].target, &slice, &error));

    lycore_strengths strengths = {.struct_size = sizeof strengths, .unet = 0.7, .text_encoder = 100.0};
    CHECK_OK(lycore_stack_add_adapter(stack, adapter, &strengths, &id, &error));
    char *report = NULL;
    CHECK_OK(lycore_stack_report(stack, id, &report, &error));
    CHECK_CONTAINS(report, "\"matched\":15");
    CHECK_CONTAINS(report, "\"unmatched\":0");
    CHECK_EQUAL(lycore_text_free(report), LYCORE_OK);

    // Nothing happens before the first apply.
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, 0.0);
    counted counter = {0, 0, 0};
    lycore_progress progress = {.struct_size = sizeof progress, .callback = count, .user_data = &counter};
    lycore_applied applied = {.struct_size = sizeof applied};
    CHECK_OK(lycore_stack_apply(stack, NULL, &progress, &applied, &error));
    CHECK_EQUAL(applied.changed, LAYERS);
    CHECK_EQUAL(applied.kept, 0);
    CHECK(counter.calls >= LAYERS && counter.done == LAYERS && counter.total == LAYERS);
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, 0.7);

    // The same again is no work.
    CHECK_OK(lycore_stack_apply(stack, NULL, NULL, &applied, &error));
    CHECK_EQUAL(applied.changed, 0);
    CHECK_EQUAL(applied.kept, LAYERS);

    // Another strength is computed from the base, not from what the weight holds. Two modules get their own; one gets none.
    const char *const patterns[] = {"*_conv", "lora_unet_blocks_0_proj", "*_half"};
    const double of_modules[] = {0.5, 2.0, 0.0};
    strengths.unet = -0.25;
    strengths.module_count = 3;
    strengths.module_patterns = patterns;
    strengths.module_strengths = of_modules;
    CHECK_OK(lycore_stack_set_strengths(stack, id, &strengths, &error));
    CHECK_OK(lycore_stack_apply(stack, NULL, NULL, &applied, &error));
    CHECK_EQUAL(applied.changed, LAYERS);
    const double want[LAYERS] = {[PROJ] = 2.0, [CONV] = 0.5, [TUCKER] = -0.25, [HALF] = 0.0, [FUSED] = -0.25};
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, want[i]);

    // The same adapter a second time: the strengths add up. Removed: they do not.
    uint64_t second = 0;
    CHECK_OK(lycore_stack_add_adapter(stack, adapter, NULL, &second, &error));
    CHECK(second != id);
    CHECK_OK(lycore_stack_apply(stack, NULL, NULL, NULL, &error));
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, want[i] + 1.0);
    CHECK_OK(lycore_stack_remove_adapter(stack, second, &error));
    CHECK_OK(lycore_stack_apply(stack, NULL, NULL, NULL, &error));
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, want[i]);

    // Restore gives the base back, bit for bit; the next apply is the first one again.
    CHECK_OK(lycore_stack_restore(stack, NULL, &error));
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, 0.0);

    strengths.unet = -0.25;
    strengths.module_count = 0;
    CHECK_OK(lycore_stack_set_strengths(stack, id, &strengths, &error));
    bypass(stack, place, -0.25);
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, 0.0);

    CHECK_OK(lycore_stack_apply(stack, NULL, NULL, NULL, &error));
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, -0.25);
    CHECK_OK(lycore_stack_restore(stack, NULL, &error));
    for (int i = 0; i < LAYERS; i++) expect_weight(&weights[i], i, place, 0.0);
    CHECK_EQUAL(lycore_stack_free(stack), LYCORE_OK);
    for (int i = 0; i < LAYERS; i++) place->release(weights[i].data);
    printf("stack: in %s\n", place->name);
}

// ---- One weight, no stack ----------------------------------------------------------------------------------------------------------------

// A host with bookkeeping of its own merges factors that it holds itself: here a whole module, and another on rows 2 to 4.
static void merge_one_weight(void) {
    layer *l = &layers[PROJ];
    weight w;
    make_weight(&w, PROJ, &host_memory);
    float up[3 * 1], down[1 * 6];
    fixture_fill(up, 3);
    fixture_fill(down, 6);

    int64_t l_up[2] = {8, 2}, l_down[2] = {2, 6}, s_up[2] = {3, 1}, s_down[2] = {1, 6};
    const char *const names[3] = {"lora_up.weight", "lora_down.weight", "alpha"};
    const lycore_tensor whole[3] = {
        tensor_of(&host_memory, l->up, 2, l_up),
        tensor_of(&host_memory, l->down, 2, l_down),
        tensor_of(&host_memory, &l->alpha, 0, NULL),
    };
    const lycore_tensor part[2] = {tensor_of(&host_memory, up, 2, s_up), tensor_of(&host_memory, down, 2, s_down)};
    const lycore_slice rows = {.axis = 0, .start = 2, .length = 3};
    const lycore_patch patches[2] = {
        {.struct_size = sizeof(lycore_patch), .count = 3, .names = names, .tensors = whole, .strength = 0.7},
        {.struct_size = sizeof(lycore_patch), .count = 2, .names = names, .tensors = part, .strength = -1.5, .slice = &rows},
    };
    CHECK_OK(lycore_weight_merge(l->target, &w.tensor, patches, 2, NULL, &error));

    double delta[MAX_ELEMENTS];
    fixture_delta(l, delta);
    for (int64_t o = 0; o < 8; o++) {
        for (int64_t i = 0; i < 6; i++) {
            const double first = 0.7 * delta[o * 6 + i];
            const double other = o >= 2 && o < 5 ? -1.5 * (double)up[o - 2] * (double)down[i] : 0.0;
            float before;
            memcpy(&before, w.base + 4 * (o * 6 + i), 4);
            CHECK_NEAR((double)((float *)w.data)[o * 6 + i], (double)before + first + other,
                       1e-6 * (fabs((double)before) + fabs(first) + fabs(other)));
        }
    }
    free(w.data);
}

// ---- A checkpoint: file to file ----------------------------------------------------------------------------------------------------------

static void merge_checkpoint(const lycore_adapter *adapter) {
    float proj[8 * 6], other[5 * 7];
    uint16_t conv[4 * 27];
    int64_t ids[3] = {-1, 0, INT64_MAX};
    fixture_fill(proj, 8 * 6);
    fixture_fill(other, 5 * 7);
    for (int i = 0; i < 4 * 27; i++) conv[i] = bf16_from_double((double)fixture_number());
    // Checkpoints call the diffusion model's weights by another first name; that is one of the built-in rules.
    const st_tensor tensors[4] = {
        {"first_stage_model.other", "F32", 2, {5, 7}, other},
        {"model.diffusion_model.blocks.0.conv.weight", "BF16", 4, {4, 3, 3, 3}, conv},
        {"model.diffusion_model.blocks.0.proj.weight", "F32", 2, {8, 6}, proj},
        {"model.ids", "I64", 1, {3}, ids},
    };
    st_write(path_of("base.safetensors"), tensors, 4);

    counted counter = {0, 0, 0};
    const lycore_progress progress = {.struct_size = sizeof progress, .callback = count, .user_data = &counter};
    const lycore_strengths strengths = {.struct_size = sizeof strengths, .unet = 0.7, .text_encoder = 1.0};
    char *report = NULL;
    CHECK_OK(lycore_checkpoint_merge(path_of("base.safetensors"), &adapter, &strengths, 1, path_of("merged.safetensors"),
                                     "{\"dtype\": \"keep\", \"device\": \"cpu\"}", &progress, &report, &error));
    CHECK_CONTAINS(report, "\"changed\":2");
    CHECK_CONTAINS(report, "\"copied\":2");
    CHECK_EQUAL(lycore_text_free(report), LYCORE_OK);
    const uint64_t bytes = sizeof proj + sizeof other + sizeof conv + sizeof ids;
    CHECK(counter.calls >= 4);
    CHECK_EQUAL(counter.done, bytes);
    CHECK_EQUAL(counter.total, bytes);

    size_t size;
    unsigned char *file = st_read(path_of("merged.safetensors"), &size);
    char *header = st_header_text(file);
    CHECK_CONTAINS(header, "\"written_by\":\"tests/c\"");
    CHECK_CONTAINS(header, "adapter.safetensors");
    CHECK_BYTES(st_find(file, &tensors[0]), other, sizeof other);
    CHECK_BYTES(st_find(file, &tensors[3]), ids, sizeof ids);
    double delta[MAX_ELEMENTS];
    fixture_delta(&layers[CONV], delta);
    for (size_t i = 0; i < 4 * 27; i++) {
        uint16_t after;
        memcpy(&after, (const char *)st_find(file, &tensors[1]) + 2 * i, 2);
        CHECK_EQUAL(after, bf16_from_double((double)bf16_to_float(conv[i]) + 0.7 * delta[i]));
    }
    fixture_delta(&layers[PROJ], delta);
    for (size_t i = 0; i < 8 * 6; i++) {
        float after;
        memcpy(&after, (const char *)st_find(file, &tensors[2]) + 4 * i, 4);
        CHECK_NEAR((double)after, (double)proj[i] + 0.7 * delta[i], 1e-6 * (fabs((double)proj[i]) + fabs(0.7 * delta[i])));
    }
    free(header);
    free(file);
}

// ---- Training ----------------------------------------------------------------------------------------------------------------------------

// A model of one Linear layer that shall learn y = x teacher^T. The host computes its own forward and backward; the network adds the
// adapter's share to both.
enum { IN = 6, OUT = 4, BATCH = 16 };
static float base[OUT * IN], x[BATCH * IN], wanted[BATCH * OUT];
static const char *const layer_name = "blocks.0.proj";

static void make_task(void) {
    float teacher[OUT * IN];
    fixture_fill(base, OUT * IN);
    fixture_fill(teacher, OUT * IN);
    fixture_fill(x, BATCH * IN);
    for (int i = 0; i < OUT * IN; i++) teacher[i] = base[i] + 0.5f * teacher[i];
    for (int n = 0; n < BATCH; n++) {
        for (int o = 0; o < OUT; o++) {
            wanted[n * OUT + o] = 0.0f;
            for (int i = 0; i < IN; i++) wanted[n * OUT + o] += x[n * IN + i] * teacher[o * IN + i];
        }
    }
}

static lycore_tensor matrix(float *data, int64_t *shape) { return tensor_of(&host_memory, data, 2, shape); }

// y = x base^T + what the network adds.
static void forward(lycore_network *network, uint64_t module, float *y) {
    int64_t x_shape[2] = {BATCH, IN}, y_shape[2] = {BATCH, OUT};
    const lycore_tensor x_tensor = matrix(x, x_shape), y_tensor = matrix(y, y_shape);
    for (int n = 0; n < BATCH; n++) {
        for (int o = 0; o < OUT; o++) {
            float sum = 0.0f;
            for (int i = 0; i < IN; i++) sum += x[n * IN + i] * base[o * IN + i];
            y[n * OUT + o] = sum;
        }
    }
    CHECK_OK(lycore_network_forward(network, module, &x_tensor, NULL, &y_tensor, NULL, &error));
}

// Mean squared error, and its gradient by y.
static double loss_of(const float *y, float *grad_y) {
    double loss = 0.0;
    for (int i = 0; i < BATCH * OUT; i++) {
        const double off = (double)y[i] - (double)wanted[i];
        loss += off * off / (BATCH * OUT);
        grad_y[i] = (float)(2.0 * off / (BATCH * OUT));
    }
    return loss;
}

// One step; the loss before it. `number` is what the network shall count it as.
static double train_step(lycore_network *network, uint64_t module, uint64_t number) {
    float y[BATCH * OUT], grad_y[BATCH * OUT];
    forward(network, module, y);
    const double loss = loss_of(y, grad_y);
    int64_t x_shape[2] = {BATCH, IN}, y_shape[2] = {BATCH, OUT};
    const lycore_tensor x_tensor = matrix(x, x_shape), grad_tensor = matrix(grad_y, y_shape);
    // The first layer of a model has nobody to pass a gradient on to.
    CHECK_OK(lycore_network_backward(network, module, &x_tensor, NULL, &grad_tensor, NULL, NULL, &error));
    lycore_step step = {.struct_size = sizeof step};
    CHECK_OK(lycore_network_step(network, NULL, &step, &error));
    CHECK_EQUAL(step.step, number);
    CHECK(step.updated && step.gradient_norm > 0.0);
    CHECK_NEAR(step.learning_rate, 0.05, 1e-12);
    return loss;
}

static lycore_network *new_network(uint64_t *module) {
    lycore_network *network = NULL;
    const int64_t shape[2] = {OUT, IN};
    const lycore_device cpu = {LYCORE_DEVICE_CPU, 0};
    CHECK_OK(lycore_network_new("{\"network_dim\": 4, \"network_alpha\": 2, \"learning_rate\": 0.05, \"max_grad_norm\": 0,"
                                " \"optimizer_args\": {\"weight_decay\": 0}, \"seed\": 7}",
                                &network, &error));
    CHECK_OK(add_layer(network, layer_name, shape, 2, NULL, module, &error));
    CHECK_OK(lycore_network_build(network, cpu, &error));
    return network;
}

// A copy of the parameters. The caller frees it.
static float *parameters(lycore_network *network, size_t *bytes) {
    lycore_tensor buffer;
    CHECK_OK(lycore_network_buffer(network, LYCORE_BUFFER_PARAMETERS, &buffer, &error));
    CHECK(buffer.ndim == 1 && buffer.device.device_type == LYCORE_DEVICE_CPU && buffer.dtype.bits == 32);
    CHECK((uint64_t)buffer.shape[0] >= lycore_network_parameter_count(network));
    *bytes = 4 * (size_t)buffer.shape[0];
    float *copy = (float *)malloc(*bytes);
    memcpy(copy, (char *)buffer.data + buffer.byte_offset, *bytes);
    return copy;
}

// Merges the trained adapter into the base, and compares the model's output with the one in training; then the gradient of x with the
// one that the merged weight gives. Frees the adapter.
static void merged_equals_trained(lycore_network *network, uint64_t module, lycore_adapter *adapter) {
    float trained[BATCH * OUT], weight_now[OUT * IN], grad_y[BATCH * OUT], grad_x[BATCH * IN];
    forward(network, module, trained);

    lycore_stack *stack = NULL;
    uint64_t id;
    int64_t shape[2] = {OUT, IN}, x_shape[2] = {BATCH, IN}, y_shape[2] = {BATCH, OUT};
    memcpy(weight_now, base, sizeof base);
    const lycore_tensor target = matrix(weight_now, shape);
    CHECK_OK(lycore_stack_new(LYCORE_BACKUP_HOST, &stack, &error));
    CHECK_OK(lycore_stack_add_target(stack, layer_name, &target, &error));
    CHECK_OK(lycore_stack_add_adapter(stack, adapter, NULL, &id, &error));
    CHECK_OK(lycore_stack_apply(stack, NULL, NULL, NULL, &error));
    CHECK(memcmp(weight_now, base, sizeof base) != 0);
    for (int n = 0; n < BATCH; n++) {
        for (int o = 0; o < OUT; o++) {
            double y = 0.0;
            for (int i = 0; i < IN; i++) y += (double)x[n * IN + i] * (double)weight_now[o * IN + i];
            CHECK_NEAR((double)trained[n * OUT + o], y, 1e-5);
        }
    }

    fixture_fill(grad_y, BATCH * OUT);
    fixture_fill(grad_x, BATCH * IN);
    float before[BATCH * IN];
    memcpy(before, grad_x, sizeof before);
    const lycore_tensor x_tensor = matrix(x, x_shape), grad_y_tensor = matrix(grad_y, y_shape), grad_x_tensor = matrix(grad_x, x_shape);
    CHECK_OK(lycore_network_backward(network, module, &x_tensor, NULL, &grad_y_tensor, &grad_x_tensor, NULL, &error));
    for (int n = 0; n < BATCH; n++) {
        for (int i = 0; i < IN; i++) {
            double added = 0.0;
            for (int o = 0; o < OUT; o++) added += (double)grad_y[n * OUT + o] * ((double)weight_now[o * IN + i] - (double)base[o * IN + i]);
            CHECK_NEAR((double)grad_x[n * IN + i], (double)before[n * IN + i] + added, 1e-5);
        }
    }
    // These gradients were not meant for the optimizer.
    lycore_tensor gradients;
    CHECK_OK(lycore_network_zero_gradients(network, NULL, &error));
    CHECK_OK(lycore_network_buffer(network, LYCORE_BUFFER_GRADIENTS, &gradients, &error));
    for (int64_t i = 0; i < gradients.shape[0]; i++) CHECK(((float *)gradients.data)[i] == 0.0f);

    CHECK_EQUAL(lycore_stack_free(stack), LYCORE_OK);
    CHECK_EQUAL(lycore_adapter_free(adapter), LYCORE_OK);
}

// The config says which files are written when, and which older ones go for them.
static void checkpoints(void) {
    char config[4096];
    snprintf(config, sizeof config, "output_dir = '%s'\noutput_name = 'run'\nsave_every_n_steps = 1\nsave_last_n_steps = 1\n", path_of("run"));
    lycore_network *network = NULL;
    uint64_t module;
    const int64_t shape[2] = {OUT, IN};
    const lycore_device cpu = {LYCORE_DEVICE_CPU, 0};
    CHECK_OK(lycore_network_new(config, &network, &error));
    CHECK_OK(add_layer(network, layer_name, shape, 2, NULL, &module, &error));
    CHECK_OK(lycore_network_build(network, cpu, &error));
    for (int i = 1; i <= 3; i++) {
        char *report = NULL;
        CHECK_OK(lycore_network_step(network, NULL, NULL, &error));
        CHECK_OK(lycore_network_checkpoint(network, LYCORE_MOMENT_STEP, NAN, NULL, &report, &error));
        CHECK_CONTAINS(report, i == 1 ? "\"deleted\":[]" : i == 2 ? "step00000002.safetensors\"],\"deleted\":[]" : "step00000001.safetensors\"],\"left\"");
        CHECK_EQUAL(lycore_text_free(report), LYCORE_OK);
    }
    CHECK_OK(lycore_network_checkpoint(network, LYCORE_MOMENT_EPOCH, NAN, NULL, NULL, &error));
    CHECK_EQUAL(lycore_network_epochs(network), 1);
    CHECK_OK(lycore_network_checkpoint(network, LYCORE_MOMENT_END, NAN, NULL, NULL, &error));
    lycore_adapter *adapter = NULL;
    CHECK_OK(lycore_adapter_open(path_of("run/run.safetensors"), &adapter, &error));
    CHECK_EQUAL(lycore_adapter_free(adapter), LYCORE_OK);
    CHECK_EQUAL(lycore_network_free(network), LYCORE_OK);
    const char *const left[] = {"run/run-step00000002.safetensors", "run/run-step00000003.safetensors", "run/run.safetensors"};
    for (size_t i = 0; i < 3; i++) CHECK_EQUAL(unlink(path_of(left[i])), 0);
    CHECK_EQUAL(rmdir(path_of("run")), 0);
}

static void train(void) {
    make_task();
    char *schema = NULL;
    CHECK_OK(lycore_network_schema(&schema, &error));
    CHECK_CONTAINS(schema, "network_dim");
    CHECK_EQUAL(lycore_text_free(schema), LYCORE_OK);

    uint64_t module, module_b;
    lycore_network *network = new_network(&module);
    CHECK_EQUAL(lycore_network_parameter_count(network), 4 * (OUT + IN));
    double first = 0.0, last = 0.0;
    for (uint64_t i = 1; i <= 50; i++) {
        last = train_step(network, module, i);
        if (i == 1) first = last;
    }
    printf("training: loss %.3g, after 50 steps %.3g\n", first, last);
    CHECK(last < first / 10.0);

    CHECK_OK(lycore_network_save(network, path_of("trained.safetensors"), LYCORE_BUFFER_PARAMETERS, NULL, "{\"ss_training_comment\": \"a test\"}", &error));
    lycore_adapter *saved = NULL, *live = NULL;
    CHECK_OK(lycore_adapter_open(path_of("trained.safetensors"), &saved, &error));
    merged_equals_trained(network, module, saved);
    CHECK_OK(lycore_network_adapter(network, NULL, &live, &error));
    merged_equals_trained(network, module, live);
    CHECK_EQUAL(lycore_network_free(network), LYCORE_OK);
    checkpoints();

    // The file is also a start for another run.
    uint64_t loaded = 0;
    float y[BATCH * OUT], grad_y[BATCH * OUT];
    network = new_network(&module);
    CHECK_OK(lycore_network_load_weights(network, path_of("trained.safetensors"), &loaded, &error));
    CHECK_EQUAL(loaded, 1);
    forward(network, module, y);
    // The last step may have overshot a little; what counts is that the trained factors are there.
    CHECK(loss_of(y, grad_y) < first / 10.0);
    CHECK_EQUAL(lycore_network_free(network), LYCORE_OK);

    // A run that is interrupted after 10 steps and goes on in a new process ends on the same bits as one of 20.
    lycore_network *whole = new_network(&module), *before = new_network(&module_b);
    for (uint64_t i = 1; i <= 20; i++) train_step(whole, module, i);
    for (uint64_t i = 1; i <= 10; i++) train_step(before, module_b, i);
    CHECK_OK(lycore_network_save_state(before, path_of("state.safetensors"), &error));
    CHECK_EQUAL(lycore_network_free(before), LYCORE_OK);
    lycore_network *after = new_network(&module_b);
    CHECK_OK(lycore_network_load_state(after, path_of("state.safetensors"), &error));
    for (uint64_t i = 11; i <= 20; i++) train_step(after, module_b, i);
    size_t bytes, bytes_b;
    float *a = parameters(whole, &bytes), *b = parameters(after, &bytes_b);
    CHECK_EQUAL(bytes_b, bytes);
    CHECK_BYTES(b, a, bytes);
    free(a);
    free(b);
    CHECK_EQUAL(lycore_network_free(whole), LYCORE_OK);
    CHECK_EQUAL(lycore_network_free(after), LYCORE_OK);
}

// In a build without libtorch the calls are there and say so.
static void no_training(void) {
    lycore_network *network = NULL;
    CHECK_EQUAL(lycore_network_new("{}", &network, &error), LYCORE_UNSUPPORTED);
    CHECK(network == NULL);
    CHECK_EQUAL(lycore_error_status(error), LYCORE_UNSUPPORTED);
    CHECK_CONTAINS(lycore_error_message(error), "training");
    CHECK_EQUAL(lycore_error_free(error), LYCORE_OK);
    error = NULL;
    printf("training: not in this build\n");
}

int main(int argc, char **argv) {
    const char *temporary = getenv("TMPDIR");
    snprintf(folder, sizeof folder, "%s/lycore-host-XXXXXX", temporary != NULL && strlen(temporary) < 32 ? temporary : "/tmp");
    if (mkdtemp(folder) == NULL) st_die("cannot be made", folder);
    fixture_make();

    bool training, gpu;
    versions();
    capabilities(&training, &gpu);
    lycore_adapter *adapter = open_adapter();
    stack_part(adapter, &host_memory);
    if (argc > 1 && strcmp(argv[1], "cuda") == 0) {
        if (gpu && open_cuda()) {
            stack_part(adapter, &gpu_memory);
        } else {
            printf("skipped: no GPU\n");
        }
    }
    merge_one_weight();
    merge_checkpoint(adapter);
    if (training) {
        train();
    } else {
        no_training();
    }
    CHECK_EQUAL(lycore_adapter_free(adapter), LYCORE_OK);

    // Files appear whole or not at all: beside what was asked for nothing is left, so the folder can be removed.
    const char *const written[] = {"adapter", "saved", "base", "merged", "trained", "state"};
    for (size_t i = 0; i < sizeof written / sizeof *written; i++) {
        char name[32];
        snprintf(name, sizeof name, "%s.safetensors", written[i]);
        CHECK(unlink(path_of(name)) == 0 || (!training && i >= 4));
    }
    CHECK_EQUAL(rmdir(folder), 0);
    return check_end("host.c");
}
