// The least of safetensors that the tests need: write a file from tensors in memory, find a tensor's bytes in one that the library wrote.
// It trusts its input (the library's own reader is the one that must not) and, as the format, takes the machine to be little-endian.
#ifndef SAFETENSORS_H
#define SAFETENSORS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct st_tensor {
    const char *name;
    const char *dtype;  // "F32", "BF16", "I64"
    int ndim;
    int64_t shape[5];
    const void *data;
} st_tensor;

static inline void st_die(const char *what, const char *path) {
    printf("%s: %s\n", path, what);
    exit(1);
}

static inline size_t st_bytes(const st_tensor *tensor) {
    size_t bytes = strcmp(tensor->dtype, "I64") == 0 ? 8 : strcmp(tensor->dtype, "BF16") == 0 ? 2 : 4;
    for (int i = 0; i < tensor->ndim; i++) bytes *= (size_t)tensor->shape[i];
    return bytes;
}

// The header for `count` tensors: 8 bytes of length, JSON, spaces up to a multiple of 8. The caller frees it.
static inline char *st_header(const st_tensor *tensors, int count, size_t *size) {
    size_t room = 256 + 512 * (size_t)count, end = 0;
    char *header = (char *)malloc(room), *at = header + 8, *stop = header + room;
    if (header == NULL) st_die("no memory", "safetensors header");
    at += snprintf(at, (size_t)(stop - at), "{\"__metadata__\":{\"written_by\":\"tests/c\"}");
    for (int i = 0; i < count; i++) {
        const st_tensor *t = &tensors[i];
        size_t begin = end;
        end += st_bytes(t);
        at += snprintf(at, (size_t)(stop - at), ",\"%s\":{\"dtype\":\"%s\",\"shape\":[", t->name, t->dtype);
        for (int k = 0; k < t->ndim; k++) at += snprintf(at, (size_t)(stop - at), k == 0 ? "%lld" : ",%lld", (long long)t->shape[k]);
        at += snprintf(at, (size_t)(stop - at), "],\"data_offsets\":[%zu,%zu]}", begin, end);
    }
    *at++ = '}';
    while ((at - header) % 8 != 0) *at++ = ' ';
    uint64_t length = (uint64_t)(at - header - 8);
    for (int i = 0; i < 8; i++) header[i] = (char)(unsigned char)(length >> (8 * i));
    *size = (size_t)(at - header);
    return header;
}

// A whole file in memory. The caller frees it.
static inline unsigned char *st_encode(const st_tensor *tensors, int count, size_t *size) {
    char *header = st_header(tensors, count, size);
    size_t at = *size;
    for (int i = 0; i < count; i++) *size += st_bytes(&tensors[i]);
    unsigned char *file = (unsigned char *)realloc(header, *size);
    if (file == NULL) st_die("no memory", "safetensors file");
    for (int i = 0; i < count; i++) {
        memcpy(file + at, tensors[i].data, st_bytes(&tensors[i]));
        at += st_bytes(&tensors[i]);
    }
    return file;
}

static inline void st_write_bytes(const char *path, const void *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    if (file == NULL || fwrite(bytes, 1, size, file) != size || fclose(file) != 0) st_die("cannot be written", path);
}

static inline void st_write(const char *path, const st_tensor *tensors, int count) {
    size_t size;
    unsigned char *bytes = st_encode(tensors, count, &size);
    st_write_bytes(path, bytes, size);
    free(bytes);
}

// A whole file, with a NUL behind it so that the header can be searched as text. The caller frees it.
static inline unsigned char *st_read(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    long end = -1;
    if (file == NULL || fseek(file, 0, SEEK_END) != 0 || (end = ftell(file)) < 8) st_die("cannot be read", path);
    unsigned char *bytes = (unsigned char *)malloc((size_t)end + 1);
    rewind(file);
    if (bytes == NULL || fread(bytes, 1, (size_t)end, file) != (size_t)end) st_die("cannot be read", path);
    fclose(file);
    bytes[end] = 0;
    *size = (size_t)end;
    return bytes;
}

// The header's text, copied. The caller frees it.
static inline char *st_header_text(const unsigned char *file) {
    uint64_t length;
    memcpy(&length, file, 8);
    char *text = (char *)calloc((size_t)length + 1, 1);
    if (text == NULL) st_die("no memory", "safetensors header");
    memcpy(text, file + 8, (size_t)length);
    return text;
}

// A tensor's bytes in a file read by st_read; ends the program when they are missing or not `bytes` long, or of another dtype.
static inline const void *st_find(const unsigned char *file, const st_tensor *wanted) {
    char key[256], dtype[32];
    unsigned long long begin = 0, end = 0;
    uint64_t length;
    memcpy(&length, file, 8);
    char *text = st_header_text(file), *entry, *offsets;
    snprintf(key, sizeof key, "\"%s\":{", wanted->name);
    snprintf(dtype, sizeof dtype, "\"dtype\":\"%s\"", wanted->dtype);
    entry = strstr(text, key);
    if (entry == NULL) st_die("is not in the file", wanted->name);
    *strchr(entry, '}') = '\0';
    if (strstr(entry, dtype) == NULL) st_die("has another dtype", wanted->name);
    offsets = strstr(entry, "\"data_offsets\":[");
    if (offsets == NULL || sscanf(offsets, "\"data_offsets\":[%llu,%llu]", &begin, &end) != 2 || end - begin != st_bytes(wanted)) {
        st_die("has another size", wanted->name);
    }
    free(text);
    return file + 8 + length + begin;
}

#endif
