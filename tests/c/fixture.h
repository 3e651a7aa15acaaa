// What the hosts of this folder adapt: five small layers, an adapter for them as a kohya file, and the formula of its modules in double,
// written once more from the definition and not from the library.
#ifndef FIXTURE_H
#define FIXTURE_H

#include "safetensors.h"

#include <math.h>

enum { LAYERS = 5, MAX_ELEMENTS = 4 * 3 * 3 * 3, MAX_RANK = 2 };

// One module of the adapter and the weight that it changes.
typedef struct layer {
    const char *module;  // as the file spells it
    const char *target;  // as the host calls the weight
    int64_t shape[4];    // of the weight; where it is a slice of a fused one: of the slice
    int ndim;
    int64_t rank;
    float alpha;  // 0: the file gives none, which means the rank
    int tucker;   // with a core `mid` that holds the kernel
    float up[8 * MAX_RANK], down[MAX_RANK * 3 * 9], mid[MAX_RANK * MAX_RANK * 9];
} layer;

static layer layers[LAYERS] = {
    {"lora_unet_blocks_0_proj", "blocks.0.proj.weight", {8, 6, 1, 1}, 2, 2, 1.0f, 0, {0}, {0}, {0}},
    {"lora_unet_blocks_0_conv", "blocks.0.conv.weight", {4, 3, 3, 3}, 4, 2, 0.0f, 0, {0}, {0}, {0}},
    {"lora_unet_blocks_0_tucker", "blocks.0.tucker", {4, 3, 3, 3}, 4, 2, 4.0f, 1, {0}, {0}, {0}},
    {"lora_unet_blocks_0_half", "blocks.0.half.weight", {8, 6, 1, 1}, 2, 2, 2.0f, 0, {0}, {0}, {0}},
    // A k that the host keeps as rows 4 to 7 of a fused weight.
    {"lora_unet_blocks_0_attn_k", "blocks.0.attn.qkv.weight", {4, 6, 1, 1}, 2, 1, 1.0f, 0, {0}, {0}, {0}},
};
enum { PROJ, CONV, TUCKER, HALF, FUSED };

// The next of a fixed row of numbers in (-1, 1): every run computes the same.
static inline float fixture_number(void) {
    static uint32_t state = 20240229u;
    state = state * 1664525u + 1013904223u;
    return ((float)(state >> 8) + 0.5f) / 8388608.0f - 1.0f;
}

static inline void fixture_fill(float *values, int64_t count) {
    for (int64_t i = 0; i < count; i++) values[i] = fixture_number();
}

// Puts a module on a layer of this weight: a Linear layer, or a convolution.
static inline lycore_status add_layer(lycore_network *network, const char *name, const int64_t *shape, uint64_t ndim, const lycore_geometry *geometry,
                                      uint64_t *index, lycore_error **error) {
    lycore_layer given;
    memset(&given, 0, sizeof given);
    given.struct_size = sizeof given;
    given.form = LYCORE_LAYER_SLIDING;
    given.shape = shape;
    given.ndim = ndim;
    given.geometry = geometry;
    return lycore_network_add_layer(network, name, &given, index, error);
}

static inline int64_t fixture_columns(const layer *l) { return l->shape[1] * l->shape[2] * l->shape[3]; }

// Fills the factors; once, before anything else.
static inline void fixture_make(void) {
    for (int i = 0; i < LAYERS; i++) {
        layer *l = &layers[i];
        fixture_fill(l->up, l->shape[0] * l->rank);
        fixture_fill(l->down, l->rank * (l->tucker ? l->shape[1] : fixture_columns(l)));
        if (l->tucker) fixture_fill(l->mid, l->rank * l->rank * l->shape[2] * l->shape[3]);
    }
}

// The adapter's tensors: up to 4 per layer.
static inline int fixture_tensors(st_tensor *out, char (*names)[64]) {
    int count = 0;
    for (int i = 0; i < LAYERS; i++) {
        const layer *l = &layers[i];
        const int axes = l->ndim;
        const int64_t kh = l->tucker ? 1 : l->shape[2], kw = l->tucker ? 1 : l->shape[3];
        const st_tensor up = {names[count], "F32", axes, {l->shape[0], l->rank, 1, 1, 0}, l->up};
        snprintf(names[count], 64, "%s.lora_up.weight", l->module);
        out[count++] = up;
        const st_tensor down = {names[count], "F32", axes, {l->rank, l->shape[1], kh, kw, 0}, l->down};
        snprintf(names[count], 64, "%s.lora_down.weight", l->module);
        out[count++] = down;
        if (l->tucker) {
            const st_tensor mid = {names[count], "F32", axes, {l->rank, l->rank, l->shape[2], l->shape[3], 0}, l->mid};
            snprintf(names[count], 64, "%s.lora_mid.weight", l->module);
            out[count++] = mid;
        }
        if (l->alpha != 0.0f) {
            const st_tensor alpha = {names[count], "F32", 0, {0, 0, 0, 0, 0}, &l->alpha};
            snprintf(names[count], 64, "%s.alpha", l->module);
            out[count++] = alpha;
        }
    }
    return count;
}

// The adapter as a file in memory. The caller frees it.
static inline unsigned char *fixture_encode(size_t *size) {
    st_tensor tensors[4 * LAYERS];
    char names[4 * LAYERS][64];
    return st_encode(tensors, fixture_tensors(tensors, names), size);
}

static inline void fixture_write(const char *path) {
    size_t size;
    unsigned char *bytes = fixture_encode(&size);
    st_write_bytes(path, bytes, size);
    free(bytes);
}

// The module's delta at strength 1, [out, in * kernel]:
//     alpha / rank * sum_p up[o, p] * down[p, i, k]
// and with a core  alpha / rank * sum_pq up[o, p] * mid[p, q, k] * down[q, i].
static inline void fixture_delta(const layer *l, double *delta) {
    const int64_t r = l->rank, in = l->shape[1], kernel = l->shape[2] * l->shape[3];
    const double scale = l->alpha == 0.0f ? 1.0 : (double)l->alpha / (double)r;
    for (int64_t o = 0; o < l->shape[0]; o++) {
        for (int64_t i = 0; i < in; i++) {
            for (int64_t k = 0; k < kernel; k++) {
                double sum = 0.0;
                for (int64_t p = 0; p < r; p++) {
                    double down = 0.0;
                    if (l->tucker) {
                        for (int64_t q = 0; q < r; q++) down += (double)l->mid[(p * r + q) * kernel + k] * (double)l->down[q * in + i];
                    } else {
                        down = (double)l->down[(p * in + i) * kernel + k];
                    }
                    sum += (double)l->up[o * r + p] * down;
                }
                delta[(o * in + i) * kernel + k] = scale * sum;
            }
        }
    }
}

static inline float bf16_to_float(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// Rounds a finite double to the nearest bf16, ties to even. The neighbours are compared in double: going through float would round twice.
static inline uint16_t bf16_from_double(double value) {
    const float narrow = (float)value;
    uint32_t wide;
    memcpy(&wide, &narrow, 4);
    // The bf16 at or below the magnitude, and the next one.
    const uint16_t low = (uint16_t)(wide >> 16), high = (uint16_t)(low + 1);
    const double below = fabs(value - (double)bf16_to_float(low)), above = fabs(value - (double)bf16_to_float(high));
    return below < above || (below == above && low % 2 == 0) ? low : high;
}

#endif
