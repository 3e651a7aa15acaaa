// What a host can get wrong about files, numbers, names, shapes and the order of calls. As misuse.c: the promised status, a message, nothing
// changed, no crash.

#include "misuse.h"

// ---- Adapters and files --------------------------------------------------------------------------------------------------------------------

static void adapters(void) {
    static const float zeros[64] = {0};
    char path[128], long_path[6000];
    FAILS(LYCORE_BAD_ARGUMENT, lycore_adapter_module(adapter, LAYERS, &out.module, e));
    FAILS(LYCORE_BAD_ARGUMENT, lycore_adapter_module(adapter, UINT64_MAX, &out.module, e));
    FAILS(LYCORE_BAD_ARGUMENT, lycore_adapter_tensor(adapter, LAYERS, 0, &out.name, &out.tensor, e));
    FAILS(LYCORE_BAD_ARGUMENT, lycore_adapter_tensor(adapter, 0, 3, &out.name, &out.tensor, e));
    FAILS(LYCORE_BAD_ARGUMENT, lycore_adapter_tensor(adapter, UINT64_MAX, UINT64_MAX, &out.name, &out.tensor, e));

    memset(long_path, 'x', sizeof long_path);
    long_path[0] = '/';
    long_path[sizeof long_path - 1] = '\0';
    FAILS(LYCORE_FILE, lycore_adapter_open(path_of("missing"), &out.adapter, e));
    FAILS(LYCORE_FILE, lycore_adapter_open("", &out.adapter, e));
    FAILS(LYCORE_FILE, lycore_adapter_open(folder, &out.adapter, e));
    FAILS(LYCORE_FILE, lycore_adapter_open(long_path, &out.adapter, e));
    FAILS(LYCORE_FILE, lycore_adapter_open("/dev/null", &out.adapter, e));

    // Bytes that are no adapter, as a file and in memory.
    size_t size = 0;
    const st_tensor of_a_model[] = {{"model.weight", "F32", 2, {2, 2}, zeros}};
    const st_tensor half[] = {{"lora_unet_a.lora_up.weight", "F32", 2, {2, 2}, zeros}};
    const st_tensor misfit[] = {{"lora_unet_a.lora_up.weight", "F32", 2, {2, 2}, zeros}, {"lora_unet_a.lora_down.weight", "F32", 2, {3, 2}, zeros}};
    const st_tensor integers[] = {{"lora_unet_a.lora_up.weight", "I64", 2, {2, 2}, zeros}, {"lora_unet_a.lora_down.weight", "I64", 2, {2, 2}, zeros}};
    const st_tensor foreign[] = {{"lora_unet_a.bias_indices", "F32", 1, {2}, zeros}};
    const struct { const void *bytes; const st_tensor *tensors; int count; size_t size; lycore_status want; } cases[] = {
        {"", NULL, 0, 0, LYCORE_FILE},
        {"garbage", NULL, 0, 7, LYCORE_FILE},
        {"garbage that is a little longer than a header's length", NULL, 0, 54, LYCORE_FILE},
        {"\xff\xff\xff\xff\xff\xff\xff\xff{}", NULL, 0, 10, LYCORE_FILE},
        {"\x02\0\0\0\0\0\0\0{}", NULL, 0, 10, LYCORE_FILE},
        {NULL, of_a_model, 1, 0, LYCORE_FILE},
        {NULL, half, 1, 0, LYCORE_KEY},
        {NULL, misfit, 2, 0, LYCORE_KEY},
        {NULL, integers, 2, 0, LYCORE_KEY},
        {NULL, foreign, 1, 0, LYCORE_UNSUPPORTED},
    };
    snprintf(path, sizeof path, "%s", path_of("bad.safetensors"));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        unsigned char *made = cases[i].tensors == NULL ? NULL : st_encode(cases[i].tensors, cases[i].count, &size);
        const void *bytes = made == NULL ? cases[i].bytes : made;
        if (made == NULL) size = cases[i].size;
        st_write_bytes(path, bytes, size);
        const int before = check_failures;
        FAILS(cases[i].want, lycore_adapter_open(path, &out.adapter, e));
        FAILS(cases[i].want, lycore_adapter_open_memory((const uint8_t *)bytes, size, &out.adapter, e));
        if (check_failures > before) printf("  with file %d\n", (int)i);
        free(made);
    }
    // Every beginning of a good file is a cut-off one.
    unsigned char *whole = fixture_encode(&size);
    for (size_t cut = 0; cut < size; cut += 61) FAILS(LYCORE_FILE, lycore_adapter_open_memory(whole, cut, &out.adapter, e));
    free(whole);
    CHECK_EQUAL(unlink(path), 0);

    FAILS(LYCORE_FILE, lycore_adapter_save(adapter, path_of("no-such-folder/a.safetensors"), e));
    FAILS(LYCORE_FILE, lycore_adapter_save(adapter, folder, e));
    FAILS(LYCORE_FILE, lycore_adapter_save(adapter, "", e));
    FAILS(LYCORE_FILE, lycore_adapter_save(adapter, "/dev/full", e));
    UNTOUCHED();
}

static void checkpoints(void) {
    const lycore_adapter *const list[1] = {adapter};
    const lycore_status bad = LYCORE_BAD_ARGUMENT;
    char path[128];
    snprintf(path, sizeof path, "%s", path_of("bad.safetensors"));
#define MERGE(base, output, options) lycore_checkpoint_merge(base, list, NULL, 1, output, options, NULL, &out.text, e)
    FAILS(LYCORE_FILE, MERGE(path_of("missing"), output_path, NULL));
    FAILS(LYCORE_FILE, MERGE("", output_path, NULL));
    FAILS(LYCORE_FILE, MERGE(folder, output_path, NULL));
    FAILS(LYCORE_FILE, MERGE(base_path, path_of("no-such-folder/a.safetensors"), NULL));
    FAILS(LYCORE_FILE, MERGE(base_path, folder, NULL));
    FAILS(LYCORE_FILE, MERGE(base_path, "", NULL));
    st_write_bytes(path, "", 0);
    FAILS(LYCORE_FILE, MERGE(path, output_path, NULL));
    st_write_bytes(path, "garbage, garbage", 16);
    FAILS(LYCORE_FILE, MERGE(path, output_path, NULL));

    static const char *const options[] = {"", "{", "[]", "null", "7", "{\"dtyp\": \"fp16\"}", "{\"dtype\": \"int8\"}", "{\"dtype\": 16}",
                                          "{\"dtype\": null}", "{\"device\": \"tpu\"}", "{\"device\": \"cuda:\"}", "{\"device\": \"cuda:-1\"}",
                                          "{\"device\": 0}", "{\"dtype\": \"fp16\"} x"};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) FAILS(bad, MERGE(base_path, output_path, options[i]));
    // An unknown key is named.
    CHECK_EQUAL(lycore_checkpoint_merge(base_path, list, NULL, 1, output_path, "{\"dtyp\": 1}", NULL, NULL, &error), bad);
    CHECK_CONTAINS(lycore_error_message(error), "dtyp");
    CHECK_EQUAL(lycore_error_free(error), LYCORE_OK);
    if (!gpu) FAILS(LYCORE_DEVICE, MERGE(base_path, output_path, "{\"device\": \"cuda:0\"}"));

    const float zeros[4] = {0};
    const st_tensor other[] = {{"another.model", "F32", 2, {2, 2}, zeros}};
    st_write(path, other, 1);
    FAILS(LYCORE_KEY, MERGE(path, output_path, NULL));
    CHECK_EQUAL(unlink(path), 0);

    lycore_strengths strengths = {.struct_size = sizeof strengths, .unet = NAN, .text_encoder = 1.0};
    FAILS(bad, lycore_checkpoint_merge(base_path, list, &strengths, 1, output_path, NULL, NULL, NULL, e));
    lycore_progress progress = {.struct_size = sizeof progress, .callback = stop};
    FAILS(LYCORE_CANCELLED, lycore_checkpoint_merge(base_path, list, NULL, 1, output_path, NULL, &progress, &out.text, e));
    lycore_cancel *flag = NULL;
    WORKS(lycore_cancel_new(&flag, e));
    progress.callback = go_on;
    progress.cancel = flag;
    CHECK_EQUAL(lycore_cancel_request(flag), LYCORE_OK);
    CHECK_EQUAL(lycore_cancel_request(flag), LYCORE_OK);
    FAILS(LYCORE_CANCELLED, lycore_checkpoint_merge(base_path, list, NULL, 1, output_path, NULL, &progress, &out.text, e));
    UNTOUCHED();
    CHECK(!exists(output_path));

    // Right after all of that: lowered, the flag lets a merge through; no adapter at all is a copy.
    CHECK_EQUAL(lycore_cancel_reset(flag), LYCORE_OK);
    WORKS(lycore_checkpoint_merge(base_path, list, NULL, 1, output_path, NULL, &progress, NULL, e));
    CHECK_EQUAL(lycore_cancel_free(flag), LYCORE_OK);
    WORKS(lycore_checkpoint_merge(base_path, NULL, NULL, 0, output_path, NULL, NULL, NULL, e));
    CHECK_EQUAL(unlink(output_path), 0);
}

// ---- The stack -----------------------------------------------------------------------------------------------------------------------------

static void numbers_of_the_user(void) {
    const lycore_status bad = LYCORE_BAD_ARGUMENT;
    const double not_a_number = NAN, infinite = INFINITY, one = 1.0;
    const char *const patterns[] = {"*"}, *const hole[] = {NULL}, *const broken[] = {not_utf8};
    lycore_strengths s = {.struct_size = sizeof s, .unet = 1.0, .text_encoder = 1.0};
    lycore_strengths cases[9];
    for (int i = 0; i < 9; i++) cases[i] = s;
    cases[0].unet = not_a_number;
    cases[1].unet = -infinite;
    cases[2].text_encoder = not_a_number;
    for (int i = 3; i < 9; i++) cases[i].module_count = 1, cases[i].module_patterns = patterns, cases[i].module_strengths = &one;
    cases[3].module_strengths = &not_a_number;
    cases[4].module_strengths = &infinite;
    cases[5].module_patterns = broken;
    cases[6].module_count = UINT64_MAX;
    cases[7].module_patterns = hole;
    cases[8].module_strengths = NULL;
    for (int i = 0; i < 9; i++) {
        const lycore_status want = i >= 7 ? LYCORE_NULL_ARGUMENT : bad;
        FAILS(want, lycore_stack_add_adapter(stack, adapter, &cases[i], &out.number, e));
        FAILS(want, lycore_stack_set_strengths(stack, 1, &cases[i], e));
    }
    s.module_count = 1;
    s.module_strengths = &one;
    FAILS(LYCORE_NULL_ARGUMENT, lycore_stack_set_strengths(stack, 1, &s, e));
    UNTOUCHED();
}

static void stacks(void) {
    const lycore_status bad = LYCORE_BAD_ARGUMENT;
    const char *const target = layers[PROJ].target;
    lycore_stack *s = NULL;
    FAILS(bad, lycore_stack_new(LYCORE_BACKUP_COMPACT + 1, &out.stack, e));
    FAILS(bad, lycore_stack_new(-1, &out.stack, e));

    WORKS(lycore_stack_new(LYCORE_BACKUP_AUTO, &s, e));
    WORKS(lycore_stack_self_check(s, 1, e));
    FAILS(bad, lycore_stack_set_rounding(s, 2, 0, e));
    WORKS(lycore_stack_set_rounding(s, LYCORE_ROUNDING_STOCHASTIC, 7, e));
    FAILS(LYCORE_KEY, lycore_stack_set_scale(s, "unknown", 2.0f, e));
    FAILS(LYCORE_NULL_ARGUMENT, lycore_stack_info(s, NULL, e));
    CHECK_EQUAL(lycore_stack_free(s), LYCORE_OK);

    WORKS(lycore_stack_new(LYCORE_BACKUP_HOST, &s, e));
    // Nothing to do is no mistake.
    WORKS(lycore_stack_apply(s, NULL, NULL, NULL, e));
    WORKS(lycore_stack_restore(s, NULL, e));
    FAILS(LYCORE_KEY, lycore_stack_add_adapter(s, adapter, NULL, &out.number, e));  // no weights yet
    FAILS(LYCORE_KEY, lycore_stack_forward(s, target, NULL, &x, &y, NULL, e));
    FAILS(LYCORE_KEY, lycore_stack_add_alias(s, "spelling", target, NULL, e));
    WORKS(lycore_stack_add_target(s, target, &weight, e));
    FAILS(bad, lycore_stack_add_target(s, target, &weight, e));

    const lycore_slice slices[] = {{0, 0, 9},          {0, 8, 1},          {0, 9, 0},          {1, 0, 7}, {2, 0, 1}, {UINT64_MAX, 0, 1},
                                   {0, UINT64_MAX, 1}, {0, 1, UINT64_MAX}, {1, UINT64_MAX, UINT64_MAX}};
    for (size_t i = 0; i < sizeof slices / sizeof *slices; i++) FAILS(bad, lycore_stack_add_alias(s, "spelling", target, &slices[i], e));
    // Axis 2 of a convolution is there, but only rows and columns can be sliced.
    const lycore_slice kernel_axis = {2, 0, 1};
    WORKS(lycore_stack_add_target(s, layers[CONV].target, &conv, e));
    FAILS(bad, lycore_stack_add_alias(s, "spelling", layers[CONV].target, &kernel_axis, e));
    CHECK_EQUAL(lycore_stack_free(s), LYCORE_OK);

    // An adapter whose modules have the right name on a weight of another shape.
    int64_t turned[2] = {6, 8};
    const lycore_tensor other = tensor_of(weight_data, 2, turned);
    WORKS(lycore_stack_new(LYCORE_BACKUP_HOST, &s, e));
    WORKS(lycore_stack_add_target(s, target, &other, e));
    FAILS(LYCORE_KEY, lycore_stack_add_adapter(s, adapter, NULL, &out.number, e));
    CHECK_EQUAL(lycore_stack_free(s), LYCORE_OK);

    FAILS(bad, lycore_stack_add_target(stack, "too late", &weight, e));
    FAILS(bad, lycore_stack_set_rounding(stack, LYCORE_ROUNDING_STOCHASTIC, 1, e));
    FAILS(bad, lycore_stack_set_scale(stack, target, 2.0f, e));
    FAILS(bad, lycore_stack_set_strengths(stack, 99, NULL, e));
    FAILS(bad, lycore_stack_remove_adapter(stack, 0, e));
    FAILS(bad, lycore_stack_remove_adapter(stack, UINT64_MAX, e));
    FAILS(bad, lycore_stack_report(stack, 99, &out.text, e));
    FAILS(LYCORE_KEY, lycore_stack_forward(stack, "unknown", NULL, &x, &y, NULL, e));
    UNTOUCHED();

    // A stopped apply leaves the base, also when weights were changed before.
    lycore_progress progress = {.struct_size = sizeof progress, .callback = stop};
    FAILS(LYCORE_CANCELLED, lycore_stack_apply(stack, NULL, &progress, &out.applied, e));
    weights_are_the_base();
    UNTOUCHED();
    lycore_strengths twice = {.struct_size = sizeof twice, .unet = 2.0, .text_encoder = 1.0};
    WORKS(lycore_stack_apply(stack, NULL, NULL, NULL, e));
    CHECK(memcmp(weight_data, weight_base, sizeof weight_data) != 0);
    WORKS(lycore_stack_set_strengths(stack, 1, &twice, e));
    FAILS(LYCORE_CANCELLED, lycore_stack_apply(stack, NULL, &progress, &out.applied, e));
    weights_are_the_base();
    WORKS(lycore_stack_set_strengths(stack, 1, NULL, e));

    // A stack needs the adapter's handle no longer than add_adapter. Ids are not used twice either.
    lycore_adapter *short_lived = NULL;
    uint64_t id = 0, next = 0;
    WORKS(lycore_stack_new(LYCORE_BACKUP_DEVICE, &s, e));
    WORKS(lycore_stack_add_target(s, target, &weight, e));
    WORKS(lycore_adapter_open(adapter_path, &short_lived, e));
    WORKS(lycore_stack_add_adapter(s, short_lived, NULL, &id, e));
    CHECK_EQUAL(lycore_adapter_free(short_lived), LYCORE_OK);
    WORKS(lycore_stack_apply(s, NULL, NULL, NULL, e));
    double delta[MAX_ELEMENTS];
    fixture_delta(&layers[PROJ], delta);
    for (int i = 0; i < 48; i++) CHECK_NEAR((double)weight_data[i], (double)weight_base[i] + delta[i], 1e-6);
    WORKS(lycore_stack_restore(s, NULL, e));
    WORKS(lycore_stack_remove_adapter(s, id, e));
    FAILS(bad, lycore_stack_remove_adapter(s, id, e));
    FAILS(bad, lycore_stack_set_strengths(s, id, NULL, e));
    FAILS(LYCORE_BAD_HANDLE, lycore_stack_add_adapter(s, short_lived, NULL, &out.number, e));
    WORKS(lycore_stack_add_adapter(s, adapter, NULL, &next, e));
    CHECK(next != id);
    // Freed in the middle of things, a stack leaves the weights as they are; this host did not want that.
    WORKS(lycore_stack_apply(s, NULL, NULL, NULL, e));
    CHECK_EQUAL(lycore_stack_free(s), LYCORE_OK);
    CHECK(memcmp(weight_data, weight_base, sizeof weight_data) != 0);
    memcpy(weight_data, weight_base, sizeof weight_data);

    if (!gpu) {
        // The first weight can be computed, the second is on a device that is not there: then neither is changed.
        lycore_tensor far = conv;
        far.device.device_type = LYCORE_DEVICE_CUDA;
        WORKS(lycore_stack_new(LYCORE_BACKUP_DEVICE, &s, e));
        WORKS(lycore_stack_add_target(s, target, &weight, e));
        WORKS(lycore_stack_add_target(s, layers[CONV].target, &far, e));
        WORKS(lycore_stack_add_adapter(s, adapter, NULL, &id, e));
        FAILS(LYCORE_DEVICE, lycore_stack_apply(s, NULL, NULL, &out.applied, e));
        weights_are_the_base();
        CHECK_EQUAL(lycore_stack_free(s), LYCORE_OK);
    }
    UNTOUCHED();
}

// Inputs, outputs and geometries that do not belong to the layer.
static void forwards(void) {
    const lycore_status bad = LYCORE_BAD_ARGUMENT, shape = LYCORE_SHAPE;
    const char *const proj = layers[PROJ].target, *const conv_name = layers[CONV].target;
    float y_before[sizeof y_data / sizeof *y_data];
    memcpy(y_before, y_data, sizeof y_data);
    int64_t numbers[4] = {2, 5, 1, 1};
    lycore_tensor t = x;
    t.shape = numbers;
    FAILS(shape, lycore_stack_forward(stack, proj, NULL, &t, &y, NULL, e));
    numbers[0] = 3, numbers[1] = 6;
    FAILS(shape, lycore_stack_forward(stack, proj, NULL, &t, &y, NULL, e));
    t.ndim = 0;
    FAILS(shape, lycore_stack_forward(stack, proj, NULL, &t, &y, NULL, e));
    FAILS(shape, lycore_stack_forward(stack, proj, NULL, &x, &x, NULL, e));
    FAILS(shape, lycore_stack_forward(stack, conv_name, NULL, &x, &y, NULL, e));
    int64_t turned[2] = {1, 2};
    t = x;
    t.strides = turned;
    FAILS(bad, lycore_stack_forward(stack, proj, NULL, &t, &y, NULL, e));  // x must be row-major
    t = y;
    t.strides = turned;
    FAILS(bad, lycore_stack_forward(stack, proj, NULL, &x, &t, NULL, e));

    int64_t values[4] = {1, 1, 1, 1};
    lycore_geometry g = {.struct_size = sizeof g, .axes = 2, .stride = values};
    WORKS(lycore_stack_forward(stack, conv_name, &g, &conv_x, &conv_y, NULL, e));
    memcpy(y_data, y_before, sizeof y_data);
#define CONVOLVE() lycore_stack_forward(stack, conv_name, &g, &conv_x, &conv_y, NULL, e)
    values[0] = 2;
    FAILS(shape, CONVOLVE());  // the output has the size of stride 1
    values[0] = 0;
    FAILS(bad, CONVOLVE());
    values[0] = -1;
    FAILS(bad, CONVOLVE());
    values[0] = INT64_MAX;
    FAILS(shape, CONVOLVE());
    values[0] = 1;
    // One to three axes, and as many as the layer has.
    const uint64_t axes[] = {0, 3, 4, UINT64_MAX};
    for (int i = 0; i < 4; i++) {
        g.axes = axes[i];
        FAILS(bad, CONVOLVE());
    }
    g.stride = NULL;
    g.axes = 0;
    FAILS(bad, CONVOLVE());
    g.axes = 4;
    FAILS(bad, CONVOLVE());
    g.axes = 2;
    g.dilation = values;
    values[1] = 0;
    FAILS(bad, CONVOLVE());
    values[1] = INT64_MAX;
    FAILS_OR(shape, bad, CONVOLVE());
    values[1] = INT64_C(1) << 62;  // four of them are nothing, modulo 2^64
    FAILS_OR(shape, bad, CONVOLVE());
    g.dilation = NULL;
    g.padding = values;
    values[0] = 0, values[1] = -1;
    FAILS(bad, CONVOLVE());
    // Twice this and 3 is 1 modulo 2^64: a sum that wraps would find the 3 columns of the output.
    values[0] = 0, values[1] = INT64_MAX;
    conv_x_shape[3] = 5 + 2;
    FAILS_OR(shape, bad, CONVOLVE());
    conv_x_shape[3] = 5;
    g.padding = NULL;
    const uint64_t groups[] = {2, 3, UINT64_MAX};
    for (int i = 0; i < 3; i++) {
        g.groups = groups[i];
        FAILS_OR(bad, i == 0 ? shape : bad, CONVOLVE());  // two groups divide 4 outputs, but then x has twice the channels
    }
    CHECK_BYTES(y_data, y_before, sizeof y_data);

    // Layers without elements: nothing to add, whatever the axis that is empty.
    lycore_stack *s = NULL;
    const int64_t empty[][3][4] = {
        {{8, 0}, {2, 0}, {2, 8}},
        {{0, 6}, {2, 6}, {2, 0}},
        {{8, 6}, {0, 6}, {0, 8}},
    };
    const int64_t empty_conv[][3][4] = {
        {{4, 0, 3, 3}, {1, 0, 5, 5}, {1, 4, 3, 3}},
        {{4, 3, 0, 3}, {1, 3, 5, 5}, {1, 4, 5, 3}},
        {{4, 3, 3, 3}, {0, 3, 5, 5}, {0, 4, 3, 3}},
    };
    WORKS(lycore_stack_new(LYCORE_BACKUP_HOST, &s, e));
    for (int i = 0; i < 6; i++) {
        const int32_t ndim = i < 3 ? 2 : 4;
        int64_t sizes[3][4];
        char name[16];
        memcpy(sizes, i < 3 ? empty[i] : empty_conv[i - 3], sizeof sizes);
        // Two weights with elements must not share them.
        static float other_weight[4 * 3 * 3 * 3];
        const lycore_tensor w = tensor_of(i == 5 ? other_weight : weight_data, ndim, sizes[0]), in = tensor_of(x_data, ndim, sizes[1]),
                            to = tensor_of(y_data, ndim, sizes[2]);
        snprintf(name, sizeof name, "empty.%d", i);
        WORKS(lycore_stack_add_target(s, name, &w, e));
        const int before = check_failures;
        // A kernel of size 0 may also be refused.
        const lycore_status status = lycore_stack_forward(s, name, NULL, &in, &to, NULL, NULL);
        CHECK(status == LYCORE_OK || (i == 4 && (status == LYCORE_SHAPE || status == LYCORE_BAD_ARGUMENT)));
        if (check_failures > before) printf("  with %s: %s\n", name, lycore_status_text(status));
    }
    CHECK_EQUAL(lycore_stack_free(s), LYCORE_OK);
    CHECK_BYTES(y_data, y_before, sizeof y_data);
    weights_are_the_base();
}

static void patches(void) {
    const lycore_status bad = LYCORE_BAD_ARGUMENT, null = LYCORE_NULL_ARGUMENT;
    lycore_tensor list[3];
    const char *names[3] = {slots[0], slots[1], slots[2]};
    int64_t numbers[2] = {2, 1}, turned[2] = {1, 8};
    // The first patch is good: it must not have been applied when the second turns out not to be.
    lycore_patch both[2] = {patch_of(slots, factors, 3), patch_of(names, list, 3)}, *const patch = &both[1];
#define MERGE_BOTH() lycore_weight_merge(layers[PROJ].target, &weight, both, 2, NULL, e)
#define AGAIN() (memcpy(list, factors, sizeof list), memcpy(names, slots, sizeof names), *patch = patch_of(names, list, 3))
    AGAIN(), patch->names = NULL;
    FAILS(null, MERGE_BOTH());
    AGAIN(), patch->tensors = NULL;
    FAILS(null, MERGE_BOTH());
    AGAIN(), names[1] = NULL;
    FAILS(null, MERGE_BOTH());
    AGAIN(), names[1] = not_utf8;
    FAILS(bad, MERGE_BOTH());
    AGAIN(), names[1] = "lora_sideways.weight";
    FAILS(LYCORE_UNSUPPORTED, MERGE_BOTH());
    AGAIN(), names[1] = "";
    FAILS(LYCORE_UNSUPPORTED, MERGE_BOTH());
    AGAIN(), patch->count = UINT64_MAX;
    FAILS(bad, MERGE_BOTH());
    // Incomplete or contradictory modules are what they are in a file.
    AGAIN(), patch->count = 0;
    FAILS(LYCORE_KEY, MERGE_BOTH());
    AGAIN(), patch->count = 1;
    FAILS(LYCORE_KEY, MERGE_BOTH());
    AGAIN(), list[2] = tensor_of(x_data, 1, numbers);
    FAILS(LYCORE_KEY, MERGE_BOTH());  // alpha is two numbers
    AGAIN(), list[1].shape = up_shape;
    FAILS(LYCORE_KEY, MERGE_BOTH());  // rank 2 and rank 8
    AGAIN(), list[0].strides = turned;
    FAILS(bad, MERGE_BOTH());  // not row-major
    int64_t wide[2] = {2, 7};
    AGAIN(), list[1] = tensor_of(x_data, 2, wide);
    FAILS(LYCORE_SHAPE, MERGE_BOTH());
    AGAIN(), patch->strength = NAN;
    FAILS(bad, MERGE_BOTH());
    AGAIN(), patch->strength = -INFINITY;
    FAILS(bad, MERGE_BOTH());
    const lycore_slice outside = {0, 4, 5}, around = {0, UINT64_MAX, 2}, no_axis = {2, 0, 1}, part = {0, 0, 4}, none = {0, 3, 0};
    AGAIN(), patch->slice = &outside;
    FAILS(bad, MERGE_BOTH());
    AGAIN(), patch->slice = &around;
    FAILS(bad, MERGE_BOTH());
    AGAIN(), patch->slice = &no_axis;
    FAILS(bad, MERGE_BOTH());
    AGAIN(), patch->slice = &part;
    FAILS(LYCORE_SHAPE, MERGE_BOTH());  // 8 rows for 4
    AGAIN(), patch->slice = &none;
    FAILS(LYCORE_SHAPE, MERGE_BOTH());
    weights_are_the_base();
}

// ---- Training ------------------------------------------------------------------------------------------------------------------------------

static void networks(void) {
    const lycore_status bad = LYCORE_BAD_ARGUMENT, train = LYCORE_TRAIN;
    const lycore_device cpu = {LYCORE_DEVICE_CPU, 0}, cuda = {LYCORE_DEVICE_CUDA, 0}, nowhere = {99, 0}, negative = {LYCORE_DEVICE_CUDA, -1};
    static const char *const configs[] = {"{", "[]", "null", "{\"network_dimm\": 4}", "{\"network_dim\": 0}", "{\"network_dim\": \"4\"}",
                                          "{\"learning_rate\": -1}", "{\"optimizer_type\": \"magic\"}", "{\"optimizer_args\": []}",
                                          "network_dim 4", "seed = 1\nseed = 1", "{\"seed\": 1, \"seed\": 1}", "save_best = true"};
    for (size_t i = 0; i < sizeof configs / sizeof *configs; i++) FAILS_NETWORK(bad, lycore_network_new(configs[i], &out.network, e));
    UNTOUCHED();
    if (!training) return;

    // All problems at once, the nearest key beside an unknown one.
    CHECK_EQUAL(lycore_network_new("{\"network_dimm\": 4, \"seed\": -1}", &out.network, &error), bad);
    CHECK_CONTAINS(lycore_error_message(error), "network_dim`");
    CHECK_CONTAINS(lycore_error_message(error), "seed");
    CHECK_EQUAL(lycore_error_free(error), LYCORE_OK);

    // Before it is built.
    lycore_network *n = new_network(false, false);
    FAILS(train, lycore_network_build(n, cpu, e));  // no modules
    int64_t sizes[17] = {8, 6, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3};
    const int64_t lies[][2] = {{-8, 6}, {8, INT64_MIN}, {0, 6}, {8, 0}, {INT64_C(1) << 62, INT64_C(1) << 62}};
    FAILS(bad, add_layer(n, "", weight_shape, 2, NULL, &out.number, e));
    FAILS(bad, add_layer(n, "a", NULL, 0, NULL, &out.number, e));
    FAILS(bad, add_layer(n, "a", weight_shape, 1, NULL, &out.number, e));
    FAILS(bad, add_layer(n, "a", sizes, 17, NULL, &out.number, e));
    for (int i = 0; i < 4; i++) FAILS(bad, add_layer(n, "a", lies[i], 2, NULL, &out.number, e));
    int64_t values[2] = {1, 0};
    lycore_geometry g = {.struct_size = sizeof g, .axes = 2, .stride = values};
    FAILS(bad, add_layer(n, "a", conv_shape, 4, &g, &out.number, e));
    values[1] = -1;
    FAILS(bad, add_layer(n, "a", conv_shape, 4, &g, &out.number, e));
    values[1] = 1;
    g.groups = 3;
    FAILS(bad, add_layer(n, "a", conv_shape, 4, &g, &out.number, e));
    g.groups = 1;
    g.axes = UINT64_MAX;
    FAILS(bad, add_layer(n, "a", conv_shape, 4, &g, &out.number, e));
    // Norms: a form that there is not, no weight, an eps and groups that no norm has.
    lycore_layer norm = {.struct_size = sizeof norm, .form = 4, .shape = sizes, .ndim = 1, .groups = 2, .eps = 1e-5};
    FAILS(bad, lycore_network_add_layer(n, "norm", &norm, &out.number, e));
    norm.form = -1;
    FAILS(bad, lycore_network_add_layer(n, "norm", &norm, &out.number, e));
    norm.form = LYCORE_LAYER_LAYER_NORM, norm.ndim = 0;
    FAILS(bad, lycore_network_add_layer(n, "norm", &norm, &out.number, e));
    norm.ndim = 1, norm.eps = NAN;
    FAILS(bad, lycore_network_add_layer(n, "norm", &norm, &out.number, e));
    norm.form = LYCORE_LAYER_GROUP_NORM, norm.eps = 1e-5, norm.groups = 3;
    FAILS(bad, lycore_network_add_layer(n, "norm", &norm, &out.number, e));
    norm.groups = 0;
    FAILS(bad, lycore_network_add_layer(n, "norm", &norm, &out.number, e));
    norm.groups = 2, norm.ndim = 2;
    FAILS(bad, lycore_network_add_layer(n, "norm", &norm, &out.number, e));
    // A good one is left out, since the config does not train norms.
    uint64_t none = 7;
    norm.ndim = 1;
    WORKS(lycore_network_add_layer(n, "norm", &norm, &none, e));
    CHECK_EQUAL(none, LYCORE_NO_MODULE);
    bool needs = true;
    FAILS(bad, lycore_network_needs_weight(n, 0, &needs, e));
    FAILS(bad, lycore_network_needs_weight(n, LYCORE_NO_MODULE, &needs, e));
    CHECK(needs);
    // Only build sees that the factors of a module do not fit into any memory.
    uint64_t huge;
    WORKS(add_layer(n, "huge", lies[4], 2, NULL, &huge, e));
    FAILS(bad, lycore_network_build(n, cpu, e));
    CHECK_EQUAL(lycore_network_free(n), LYCORE_OK);

    n = new_network(true, false);
    FAILS(bad, add_layer(n, "blocks.0.proj", weight_shape, 2, NULL, &out.number, e));  // twice
    FAILS(bad, add_layer(n, "lora_unet_blocks_0_proj", weight_shape, 2, NULL, &out.number, e));
    WORKS(lycore_network_needs_weight(n, 0, &needs, e));
    CHECK(!needs);
    WORKS(lycore_network_evaluate(n, true, e));
    FAILS(train, lycore_network_set_ranks(n, 0.5, NULL, e));
    FAILS(train, lycore_network_forward(n, 0, &x, NULL, &y, NULL, e));
    FAILS(train, lycore_network_backward(n, 0, &x, NULL, &y, NULL, NULL, e));
    FAILS(train, lycore_network_step(n, NULL, &out.step, e));
    FAILS(train, lycore_network_results(n, &out.step, e));
    FAILS(train, lycore_network_hold(n, true, NULL, e));
    FAILS(train, lycore_network_prepare_replay(n, 1, NULL, e));
    FAILS(train, lycore_network_zero_gradients(n, NULL, e));
    FAILS(train, lycore_network_refresh(n, NULL, e));
    FAILS(train, lycore_network_buffer(n, LYCORE_BUFFER_GRADIENTS, &out.tensor, e));
    FAILS(train, lycore_network_save(n, output_path, LYCORE_BUFFER_PARAMETERS, NULL, NULL, e));
    FAILS(train, lycore_network_checkpoint(n, LYCORE_MOMENT_EPOCH, 1.0, NULL, &out.text, e));
    CHECK_EQUAL(lycore_network_epochs(n), 0);
    FAILS(train, lycore_network_adapter(n, NULL, &out.adapter, e));
    FAILS(train, lycore_network_save_state(n, output_path, e));
    FAILS(train, lycore_network_load_state(n, adapter_path, e));
    FAILS(train, lycore_network_load_weights(n, adapter_path, &out.number, e));
    FAILS(bad, lycore_network_build(n, nowhere, e));
    FAILS(bad, lycore_network_build(n, negative, e));
    if (!gpu) FAILS(LYCORE_DEVICE, lycore_network_build(n, cuda, e));
    WORKS(lycore_network_build(n, cpu, e));
    FAILS(train, lycore_network_build(n, cpu, e));
    FAILS(train, add_layer(n, "another", weight_shape, 2, NULL, &out.number, e));

    // Built: wrong numbers, shapes, files.
    FAILS(bad, lycore_network_forward(n, 1, &x, NULL, &y, NULL, e));
    FAILS(bad, lycore_network_forward(n, UINT64_MAX, &x, NULL, &y, NULL, e));
    FAILS(bad, lycore_network_backward(n, 1, &x, NULL, &y, NULL, NULL, e));
    FAILS(LYCORE_SHAPE, lycore_network_forward(n, 0, &y, NULL, &x, NULL, e));
    FAILS(LYCORE_SHAPE, lycore_network_backward(n, 0, &y, NULL, &x, NULL, NULL, e));
    FAILS(LYCORE_SHAPE, lycore_network_backward(n, 0, &x, NULL, &y, &y, NULL, e));
    const double no_shares[] = {0.0, -0.5, 1.5, NAN, INFINITY};
    for (int i = 0; i < 5; i++) FAILS(bad, lycore_network_set_ranks(n, no_shares[i], NULL, e));
    WORKS(lycore_network_set_ranks(n, 1.0, NULL, e));
    FAILS(LYCORE_UNSUPPORTED, lycore_network_hold(n, true, NULL, e));  // on the CPU
    FAILS(LYCORE_UNSUPPORTED, lycore_network_prepare_replay(n, 1, NULL, e));
    FAILS(train, lycore_network_buffer(n, LYCORE_BUFFER_EMA, &out.tensor, e));  // which its config does not ask for
    FAILS(train, lycore_network_save(n, output_path, LYCORE_BUFFER_EMA, NULL, NULL, e));
    FAILS(bad, lycore_network_save(n, output_path, LYCORE_BUFFER_GRADIENTS, NULL, NULL, e));
    FAILS(bad, lycore_network_buffer(n, 3, &out.tensor, e));
    FAILS(bad, lycore_network_buffer(n, -1, &out.tensor, e));
    FAILS(bad, lycore_network_checkpoint(n, 3, 1.0, NULL, &out.text, e));
    FAILS(bad, lycore_network_checkpoint(n, -1, 1.0, NULL, &out.text, e));
    FAILS(train, lycore_network_checkpoint(n, LYCORE_MOMENT_END, 1.0, NULL, &out.text, e));  // no output_dir
    WORKS(lycore_network_checkpoint(n, LYCORE_MOMENT_STEP, NAN, NULL, NULL, e));  // nor anything due
    FAILS(bad, lycore_network_save(n, output_path, LYCORE_BUFFER_PARAMETERS, "fp8", NULL, e));
    FAILS(bad, lycore_network_save(n, output_path, LYCORE_BUFFER_PARAMETERS, "", NULL, e));
    FAILS(bad, lycore_network_save(n, output_path, LYCORE_BUFFER_PARAMETERS, NULL, "{", e));
    FAILS(bad, lycore_network_save(n, output_path, LYCORE_BUFFER_PARAMETERS, NULL, "{\"a\": 1}", e));
    FAILS(LYCORE_FILE, lycore_network_save(n, folder, LYCORE_BUFFER_PARAMETERS, NULL, NULL, e));
    FAILS(LYCORE_FILE, lycore_network_save(n, path_of("no-such-folder/a"), LYCORE_BUFFER_PARAMETERS, NULL, NULL, e));
    FAILS(LYCORE_FILE, lycore_network_save_state(n, path_of("no-such-folder/a"), e));
    FAILS(LYCORE_FILE, lycore_network_load_state(n, path_of("missing"), e));
    FAILS(LYCORE_FILE, lycore_network_load_state(n, folder, e));
    FAILS(LYCORE_FILE, lycore_network_load_state(n, adapter_path, e));  // an adapter is no state
    FAILS(LYCORE_FILE, lycore_network_load_weights(n, path_of("missing"), &out.number, e));
    FAILS(LYCORE_FILE, lycore_network_load_weights(n, base_path, &out.number, e));  // nor is a model an adapter
    st_write_bytes(output_path, "garbage, garbage", 16);
    FAILS(LYCORE_FILE, lycore_network_load_state(n, output_path, e));
    FAILS(LYCORE_FILE, lycore_network_load_weights(n, output_path, &out.number, e));
    UNTOUCHED();

    // A gradient that is no number changes nothing; cleared, the network goes on.
    lycore_tensor buffer;
    lycore_step step = {.struct_size = sizeof step};
    WORKS(lycore_network_buffer(n, LYCORE_BUFFER_PARAMETERS, &buffer, e));
    const size_t bytes = 4 * (size_t)buffer.shape[0];
    float *before = (float *)malloc(bytes), spoilt[16];
    memcpy(before, buffer.data, bytes);
    for (int i = 0; i < 16; i++) spoilt[i] = NAN, x_data[i] = 1.0f;
    const lycore_tensor grad = tensor_of(spoilt, 2, y_shape);
    WORKS(lycore_network_backward(n, 0, &x, NULL, &grad, NULL, NULL, e));
    FAILS(train, lycore_network_step(n, NULL, &out.step, e));
    CHECK_BYTES(buffer.data, before, bytes);
    // Whoever does not wait is told later.
    WORKS(lycore_network_step(n, NULL, NULL, e));
    CHECK_BYTES(buffer.data, before, bytes);
    WORKS(lycore_network_results(n, &step, e));
    CHECK_EQUAL(step.step, 0);
    CHECK_EQUAL(step.skipped, 1);
    WORKS(lycore_network_step(n, NULL, &step, e));
    CHECK_EQUAL(step.step, 1);
    CHECK_EQUAL(step.skipped, 0);
    for (int i = 0; i < 16; i++) x_data[i] = 0.0f;
    free(before);

    // What needs its layer's weight says so, and is neither added nor run without it, nor with one of another shape.
    lycore_network *dora = NULL;
    uint64_t number = 7;
    lycore_layer layer = {.struct_size = sizeof layer, .form = LYCORE_LAYER_SLIDING, .shape = weight_shape, .ndim = 2};
    WORKS(lycore_network_new("{\"network_dim\": 2, \"dora_wd\": true}", &dora, e));
    FAILS(bad, lycore_network_add_layer(dora, "blocks.0.proj", &layer, &out.number, e));
    layer.weight = &conv;
    FAILS(LYCORE_SHAPE, lycore_network_add_layer(dora, "blocks.0.proj", &layer, &out.number, e));
    layer.weight = &weight;
    WORKS(lycore_network_add_layer(dora, "blocks.0.proj", &layer, &number, e));
    CHECK_EQUAL(number, 0);
    WORKS(lycore_network_needs_weight(dora, 0, &needs, e));
    CHECK(needs);
    WORKS(lycore_network_build(dora, cpu, e));
    FAILS(bad, lycore_network_forward(dora, 0, &x, NULL, &y, NULL, e));
    FAILS(bad, lycore_network_backward(dora, 0, &x, NULL, &y, NULL, NULL, e));
    FAILS(LYCORE_SHAPE, lycore_network_forward(dora, 0, &x, &conv, &y, NULL, e));
    FAILS(LYCORE_SHAPE, lycore_network_backward(dora, 0, &x, &conv, &y, NULL, NULL, e));
    WORKS(lycore_network_forward(dora, 0, &x, &weight, &y, NULL, e));
    CHECK_EQUAL(lycore_network_free(dora), LYCORE_OK);
    // The operator's name is one text, whoever asks.
    char *operators[2];
    for (int i = 0; i < 2; i++) WORKS(lycore_network_operator(&operators[i], e));
    CHECK_TEXT(operators[0], operators[1]);
    CHECK_CONTAINS(operators[0], "::module");
    for (int i = 0; i < 2; i++) CHECK_EQUAL(lycore_text_free(operators[i]), LYCORE_OK);

    // Two at once do not know of each other; the state of one is refused by another of other modules, and changes nothing there.
    lycore_network *other = new_network(false, false);
    uint64_t index = 77;
    WORKS(add_layer(other, "blocks.0.conv", conv_shape, 4, NULL, &index, e));
    CHECK_EQUAL(index, 0);
    WORKS(lycore_network_build(other, cpu, e));
    CHECK(lycore_network_parameter_count(other) != lycore_network_parameter_count(n));
    WORKS(lycore_network_buffer(other, LYCORE_BUFFER_PARAMETERS, &buffer, e));
    float first;
    memcpy(&first, buffer.data, 4);
    WORKS(lycore_network_save_state(n, output_path, e));
    FAILS(LYCORE_FILE, lycore_network_load_state(other, output_path, e));
    CHECK_BYTES(buffer.data, &first, 4);
    // A state that was cut off, at any place, is refused by its own network too.
    size_t size = 0;
    unsigned char *state = st_read(output_path, &size);
    for (size_t cut = 0; cut < size; cut += size / 20 + 1) {
        st_write_bytes(output_path, state, cut);
        FAILS(LYCORE_FILE, lycore_network_load_state(n, output_path, e));
    }
    free(state);
    CHECK_EQUAL(unlink(output_path), 0);
    CHECK_EQUAL(lycore_network_free(n), LYCORE_OK);
    WORKS(lycore_network_forward(other, 0, &conv_x, NULL, &conv_y, NULL, e));
    CHECK_EQUAL(lycore_network_free(other), LYCORE_OK);
    UNTOUCHED();
}

int main(void) {
    prepare();
    adapters();
    checkpoints();
    numbers_of_the_user();
    stacks();
    forwards();
    patches();
    networks();
    return finish("misuse_order.c");
}
