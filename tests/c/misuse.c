// What a host can get wrong in one argument: NULL, dead and foreign handles, texts that are not UTF-8, structs and tensors that lie. Each must
// be answered with the status that the header promises and a message, change nothing, and never crash. misuse_order.c has the rest; run.sh
// fails when a function of the header is called in neither.

#include "misuse.h"

// ---- Handles -----------------------------------------------------------------------------------------------------------------------------
// Every call that takes a handle of the type, with everything else as it should be. `want` is what they shall answer.

static void adapter_calls(lycore_adapter *handle, lycore_status want) {
    const lycore_adapter *const list[1] = {handle};
    FAILS(want, lycore_adapter_report(handle, &out.text, e));
    FAILS(want, lycore_adapter_module(handle, 0, &out.module, e));
    FAILS(want, lycore_adapter_tensor(handle, 0, 0, &out.name, &out.tensor, e));
    FAILS(want, lycore_adapter_prefix(handle, 1, &out.adapter, e));
    FAILS(want, lycore_adapter_convert(handle, output_path, "{\"to\": \"kohya\"}", NULL, &out.text, e));
    FAILS(want, lycore_adapter_save(handle, output_path, e));
    FAILS(want, lycore_stack_add_adapter(stack, handle, NULL, &out.number, e));
    FAILS(want, lycore_checkpoint_merge(base_path, list, NULL, 1, output_path, NULL, NULL, &out.text, e));
    CHECK_EQUAL(lycore_adapter_module_count(handle), 0);
    CHECK_EQUAL(lycore_adapter_free(handle), want == LYCORE_NULL_ARGUMENT ? LYCORE_OK : want);
    CHECK(!exists(output_path));
}

static void stack_calls(lycore_stack *handle, lycore_status want) {
    FAILS(want, lycore_stack_add_target(handle, "new", &weight, e));
    FAILS(want, lycore_stack_add_alias(handle, "spelling", layers[PROJ].target, NULL, e));
    FAILS(want, lycore_stack_allow_other_families(handle, 1, e));
    FAILS(want, lycore_stack_add_adapter(handle, adapter, NULL, &out.number, e));
    FAILS(want, lycore_stack_set_strengths(handle, 1, NULL, e));
    FAILS(want, lycore_stack_remove_adapter(handle, 1, e));
    FAILS(want, lycore_stack_apply(handle, NULL, NULL, &out.applied, e));
    FAILS(want, lycore_stack_restore(handle, NULL, e));
    FAILS(want, lycore_stack_forward(handle, layers[PROJ].target, NULL, &x, &y, NULL, e));
    FAILS(want, lycore_stack_report(handle, 1, &out.text, e));
    CHECK_EQUAL(lycore_stack_free(handle), want == LYCORE_NULL_ARGUMENT ? LYCORE_OK : want);
}

static void network_calls(lycore_network *handle, lycore_status want) {
    const lycore_device cpu = {LYCORE_DEVICE_CPU, 0};
    const lycore_layer layer = {.struct_size = sizeof layer, .form = LYCORE_LAYER_SLIDING, .shape = weight_shape, .ndim = 2};
    bool needs = true;
    FAILS_NETWORK(want, lycore_network_config(handle, &out.text, e));
    FAILS_NETWORK(want, lycore_network_add_layer(handle, "new", &layer, &out.number, e));
    FAILS_NETWORK(want, lycore_network_needs_weight(handle, 0, &needs, e));
    CHECK(needs);
    FAILS_NETWORK(want, lycore_network_evaluate(handle, true, e));
    FAILS_NETWORK(want, lycore_network_set_ranks(handle, 0.5, NULL, e));
    FAILS_NETWORK(want, lycore_network_build(handle, cpu, e));
    FAILS_NETWORK(want, lycore_network_forward(handle, 0, &x, NULL, &y, NULL, e));
    FAILS_NETWORK(want, lycore_network_backward(handle, 0, &x, NULL, &y, NULL, NULL, e));
    FAILS_NETWORK(want, lycore_network_step(handle, NULL, &out.step, e));
    FAILS_NETWORK(want, lycore_network_results(handle, &out.step, e));
    FAILS_NETWORK(want, lycore_network_hold(handle, true, NULL, e));
    FAILS_NETWORK(want, lycore_network_prepare_replay(handle, 1, NULL, e));
    FAILS_NETWORK(want, lycore_network_zero_gradients(handle, NULL, e));
    FAILS_NETWORK(want, lycore_network_refresh(handle, NULL, e));
    uint64_t steps = 7, micro_steps = 7;
    FAILS_NETWORK(want, lycore_network_progress(handle, &steps, &micro_steps, e));
    CHECK_EQUAL(steps, 7);
    CHECK_EQUAL(micro_steps, 7);
    FAILS_NETWORK(want, lycore_network_buffer(handle, LYCORE_BUFFER_PARAMETERS, &out.tensor, e));
    FAILS_NETWORK(want, lycore_network_save(handle, output_path, LYCORE_BUFFER_PARAMETERS, NULL, NULL, e));
    FAILS_NETWORK(want, lycore_network_checkpoint(handle, LYCORE_MOMENT_STEP, 0.5, NULL, &out.text, e));
    FAILS_NETWORK(want, lycore_network_adapter(handle, NULL, &out.adapter, e));
    CHECK_EQUAL(lycore_network_epochs(handle), 0);
    FAILS_NETWORK(want, lycore_network_save_state(handle, output_path, e));
    FAILS_NETWORK(want, lycore_network_load_state(handle, adapter_path, e));
    FAILS_NETWORK(want, lycore_network_load_weights(handle, adapter_path, &out.number, e));
    CHECK_EQUAL(lycore_network_parameter_count(handle), 0);
    CHECK_EQUAL(lycore_network_free(handle), want == LYCORE_NULL_ARGUMENT ? LYCORE_OK : want);
    CHECK(!exists(output_path));
}

static void cancel_calls(lycore_cancel *handle, lycore_status want) {
    CHECK_EQUAL(lycore_cancel_request(handle), want);
    CHECK_EQUAL(lycore_cancel_reset(handle), want);
    CHECK_EQUAL(lycore_cancel_free(handle), want == LYCORE_NULL_ARGUMENT ? LYCORE_OK : want);
    if (handle == NULL) return;  // a progress without a flag
    const lycore_adapter *const list[1] = {adapter};
    const lycore_progress progress = {.struct_size = sizeof progress, .cancel = handle};
    FAILS(want, lycore_stack_apply(stack, NULL, &progress, &out.applied, e));
    FAILS(want, lycore_checkpoint_merge(base_path, list, NULL, 1, output_path, NULL, &progress, &out.text, e));
    CHECK(!exists(output_path));
}

static void error_calls(lycore_error *handle) {
    CHECK_EQUAL(lycore_error_status(handle), LYCORE_BAD_HANDLE);
    CHECK_TEXT(lycore_error_message(handle), "");
    CHECK_TEXT(lycore_error_hint(handle), "");
    CHECK_TEXT(lycore_error_key(handle), "");
    CHECK_TEXT(lycore_error_file(handle), "");
    CHECK_EQUAL(lycore_error_free(handle), handle == NULL ? LYCORE_OK : LYCORE_BAD_HANDLE);
}

static void every_call(void *handle, lycore_status want) {
    adapter_calls((lycore_adapter *)handle, want);
    stack_calls((lycore_stack *)handle, want);
    network_calls((lycore_network *)handle, want);
    cancel_calls((lycore_cancel *)handle, want);
    error_calls((lycore_error *)handle);
    UNTOUCHED();
    weights_are_the_base();
}

static void handles(void) {
    every_call(NULL, LYCORE_NULL_ARGUMENT);

    // Never handles: small and large numbers, addresses of the stack, the heap and of constants, a text of the library.
    int on_stack = 0;
    char *on_heap = (char *)malloc(64), *text = NULL;
    WORKS(lycore_capabilities(&text, e));
    void *const never[] = {(void *)(uintptr_t)1,         (void *)(uintptr_t)2, (void *)(uintptr_t)0xdeadbeefu,
                           (void *)(uintptr_t)UINTPTR_MAX, &on_stack,          on_heap,
                           (void *)(uintptr_t)slots[0],  text};
    for (size_t i = 0; i < sizeof never / sizeof *never; i++) every_call(never[i], LYCORE_BAD_HANDLE);
    CHECK_EQUAL(lycore_text_free(text), LYCORE_OK);
    free(on_heap);

    // Freed ones, of each type. A number is never given out twice, so a new object does not bring an old handle back to life.
    void *freed[5] = {NULL};
    for (int again = 0; again < 2; again++) {
        lycore_adapter *a = NULL;
        lycore_stack *s = NULL;
        lycore_cancel *c = NULL;
        lycore_network *n = NULL;
        lycore_error *f = NULL;
        WORKS(lycore_adapter_open(adapter_path, &a, e));
        WORKS(lycore_stack_new(LYCORE_BACKUP_HOST, &s, e));
        WORKS(lycore_cancel_new(&c, e));
        CHECK_EQUAL(lycore_stack_restore(NULL, NULL, &f), LYCORE_NULL_ARGUMENT);
        if (training) n = new_network(true, true);
        for (int i = 0; i < 5; i++) {
            if (again && freed[i] != NULL) every_call(freed[i], LYCORE_BAD_HANDLE);
        }

        // Alive, but of another type.
        void *const alive[] = {a, s, c, f, n};
        for (int i = 0; i < (training ? 5 : 4); i++) {
            if (i != 0) adapter_calls((lycore_adapter *)alive[i], LYCORE_BAD_HANDLE);
            if (i != 1) stack_calls((lycore_stack *)alive[i], LYCORE_BAD_HANDLE);
            if (i != 2) cancel_calls((lycore_cancel *)alive[i], LYCORE_BAD_HANDLE);
            if (i != 3) error_calls((lycore_error *)alive[i]);
            if (i != 4) network_calls((lycore_network *)alive[i], LYCORE_BAD_HANDLE);
            CHECK_EQUAL(lycore_text_free((char *)alive[i]), LYCORE_BAD_HANDLE);
        }
        UNTOUCHED();

        CHECK_EQUAL(lycore_adapter_free(a), LYCORE_OK);
        CHECK_EQUAL(lycore_adapter_free(a), LYCORE_BAD_HANDLE);
        CHECK_EQUAL(lycore_stack_free(s), LYCORE_OK);
        CHECK_EQUAL(lycore_stack_free(s), LYCORE_BAD_HANDLE);
        CHECK_EQUAL(lycore_cancel_free(c), LYCORE_OK);
        CHECK_EQUAL(lycore_cancel_free(c), LYCORE_BAD_HANDLE);
        CHECK_EQUAL(lycore_error_free(f), LYCORE_OK);
        CHECK_EQUAL(lycore_error_free(f), LYCORE_BAD_HANDLE);
        CHECK_EQUAL(lycore_network_free(n), LYCORE_OK);
        if (training) CHECK_EQUAL(lycore_network_free(n), LYCORE_BAD_HANDLE);
        memcpy(freed, alive, sizeof freed);
    }
}

static void texts(void) {
    char *text = NULL, on_stack[4] = "abc";
    CHECK_EQUAL(lycore_text_free(NULL), LYCORE_OK);
    CHECK_EQUAL(lycore_text_free(on_stack), LYCORE_BAD_HANDLE);
    CHECK_EQUAL(lycore_text_free((char *)(uintptr_t)1), LYCORE_BAD_HANDLE);
    CHECK_EQUAL(lycore_text_free((char *)(uintptr_t)0xdeadbeefu), LYCORE_BAD_HANDLE);
    // A `const char *` belongs to the library.
    CHECK_EQUAL(lycore_text_free((char *)(uintptr_t)lycore_version()), LYCORE_BAD_HANDLE);
    CHECK_EQUAL(lycore_text_free((char *)(uintptr_t)lycore_torch_version()), LYCORE_BAD_HANDLE);
    CHECK_EQUAL(lycore_text_free((char *)(uintptr_t)lycore_status_text(LYCORE_OK)), LYCORE_BAD_HANDLE);
    WORKS(lycore_adapter_report(adapter, &text, e));
    CHECK_EQUAL(lycore_text_free(text + 1), LYCORE_BAD_HANDLE);
    CHECK_EQUAL(lycore_text_free(text), LYCORE_OK);
    CHECK_EQUAL(lycore_text_free(text), LYCORE_BAD_HANDLE);
    CHECK_TEXT(lycore_status_text(INT32_MIN), "unknown status");
    CHECK_TEXT(lycore_status_text(9), "unknown status");
    CHECK_EQUAL(lycore_version_number(), LYCORE_VERSION_MAJOR * 1000000 + LYCORE_VERSION_MINOR * 1000 + LYCORE_VERSION_PATCH);
}

// ---- NULL, and texts that are none ---------------------------------------------------------------------------------------------------------

static void pointers(void) {
    const lycore_status null = LYCORE_NULL_ARGUMENT, bad = LYCORE_BAD_ARGUMENT;
    const lycore_adapter *const list[1] = {adapter}, *const hole[2] = {adapter, NULL};
    const char *const target = layers[PROJ].target;
    const uint8_t byte = 0;
    lycore_patch patch = patch_of(slots, factors, 3);

    FAILS(null, lycore_cancel_new(NULL, e));
    FAILS(null, lycore_capabilities(NULL, e));
    FAILS(null, lycore_adapter_open(NULL, &out.adapter, e));
    FAILS(null, lycore_adapter_open(adapter_path, NULL, e));
    FAILS(bad, lycore_adapter_open(not_utf8, &out.adapter, e));
    FAILS(null, lycore_adapter_open_memory(NULL, 8, &out.adapter, e));
    FAILS(null, lycore_adapter_open_memory(&byte, 1, NULL, e));
    FAILS(LYCORE_FILE, lycore_adapter_open_memory(NULL, 0, &out.adapter, e));  // not looked at: an empty file
    FAILS(bad, lycore_adapter_open_memory(&byte, UINT64_MAX, &out.adapter, e));
    FAILS(null, lycore_adapter_report(adapter, NULL, e));
    FAILS(null, lycore_adapter_module(adapter, 0, NULL, e));
    FAILS(null, lycore_adapter_tensor(adapter, 0, 0, NULL, &out.tensor, e));
    FAILS(null, lycore_adapter_tensor(adapter, 0, 0, &out.name, NULL, e));
    FAILS(null, lycore_adapter_prefix(adapter, 1, NULL, e));
    FAILS(bad, lycore_adapter_prefix(adapter, 0, &out.adapter, e));
    FAILS(null, lycore_report_text(NULL, 0, &out.text, e));
    FAILS(null, lycore_report_text("{}", 0, NULL, e));
    FAILS(bad, lycore_report_text(not_utf8, 0, &out.text, e));
    FAILS(bad, lycore_report_text("{}", 0, &out.text, e));
    FAILS(null, lycore_adapter_save(adapter, NULL, e));
    FAILS(bad, lycore_adapter_save(adapter, not_utf8, e));

    FAILS(null, lycore_stack_new(LYCORE_BACKUP_HOST, NULL, e));
    FAILS(null, lycore_stack_add_target(stack, NULL, &weight, e));
    FAILS(null, lycore_stack_add_target(stack, "new", NULL, e));
    FAILS(bad, lycore_stack_add_target(stack, not_utf8, &weight, e));
    FAILS(null, lycore_stack_add_alias(stack, NULL, target, NULL, e));
    FAILS(null, lycore_stack_add_alias(stack, "spelling", NULL, NULL, e));
    FAILS(bad, lycore_stack_add_alias(stack, not_utf8, target, NULL, e));
    FAILS(bad, lycore_stack_add_alias(stack, "spelling", not_utf8, NULL, e));
    FAILS(null, lycore_stack_add_adapter(stack, adapter, NULL, NULL, e));
    FAILS(null, lycore_stack_forward(stack, NULL, NULL, &x, &y, NULL, e));
    FAILS(null, lycore_stack_forward(stack, target, NULL, NULL, &y, NULL, e));
    FAILS(null, lycore_stack_forward(stack, target, NULL, &x, NULL, NULL, e));
    FAILS(bad, lycore_stack_forward(stack, not_utf8, NULL, &x, &y, NULL, e));
    FAILS(null, lycore_stack_report(stack, 1, NULL, e));

    FAILS(null, lycore_weight_merge(NULL, &weight, &patch, 1, NULL, e));
    FAILS(null, lycore_weight_merge(target, NULL, &patch, 1, NULL, e));
    FAILS(null, lycore_weight_merge(target, &weight, NULL, 1, NULL, e));
    FAILS(bad, lycore_weight_merge(not_utf8, &weight, &patch, 1, NULL, e));
    FAILS(bad, lycore_weight_merge(target, &weight, &patch, UINT64_MAX, NULL, e));
    WORKS(lycore_weight_merge(target, &weight, NULL, 0, NULL, e));

    FAILS(null, lycore_checkpoint_merge(NULL, list, NULL, 1, output_path, NULL, NULL, NULL, e));
    FAILS(null, lycore_checkpoint_merge(base_path, NULL, NULL, 1, output_path, NULL, NULL, NULL, e));
    FAILS(null, lycore_checkpoint_merge(base_path, list, NULL, 1, NULL, NULL, NULL, NULL, e));
    FAILS(null, lycore_checkpoint_merge(base_path, hole, NULL, 2, output_path, NULL, NULL, NULL, e));
    FAILS(bad, lycore_checkpoint_merge(not_utf8, list, NULL, 1, output_path, NULL, NULL, NULL, e));
    FAILS(bad, lycore_checkpoint_merge(base_path, list, NULL, 1, not_utf8, NULL, NULL, NULL, e));
    FAILS(bad, lycore_checkpoint_merge(base_path, list, NULL, 1, output_path, not_utf8, NULL, NULL, e));
    FAILS(bad, lycore_checkpoint_merge(base_path, list, NULL, UINT64_MAX / 4, output_path, NULL, NULL, NULL, e));

    const char *const files[1] = {base_path}, *const no_file[1] = {NULL}, *const not_a_file[1] = {not_utf8};
    FAILS(null, lycore_adapter_convert(adapter, NULL, "{\"to\": \"kohya\"}", NULL, &out.text, e));
    FAILS(bad, lycore_adapter_convert(adapter, not_utf8, "{\"to\": \"kohya\"}", NULL, &out.text, e));
    FAILS(bad, lycore_adapter_convert(adapter, output_path, not_utf8, NULL, &out.text, e));
    FAILS(bad, lycore_adapter_convert(adapter, output_path, "{\"to\": \"nowhere\"}", NULL, &out.text, e));
    FAILS(null, lycore_resize(NULL, output_path, NULL, NULL, &out.text, e));
    FAILS(null, lycore_resize(base_path, NULL, NULL, NULL, &out.text, e));
    FAILS(bad, lycore_resize(not_utf8, output_path, NULL, NULL, &out.text, e));
    FAILS(bad, lycore_resize(base_path, output_path, not_utf8, NULL, &out.text, e));
    FAILS(bad, lycore_resize(base_path, output_path, "{\"rnk\": 4}", NULL, &out.text, e));
    FAILS(null, lycore_combine(NULL, NULL, 1, output_path, NULL, NULL, &out.text, e));
    FAILS(null, lycore_combine(no_file, NULL, 1, output_path, NULL, NULL, &out.text, e));
    FAILS(null, lycore_combine(files, NULL, 1, NULL, NULL, NULL, &out.text, e));
    FAILS(bad, lycore_combine(not_a_file, NULL, 1, output_path, NULL, NULL, &out.text, e));
    FAILS(bad, lycore_combine(files, NULL, UINT64_MAX / 4, output_path, NULL, NULL, &out.text, e));
    FAILS(bad, lycore_combine(files, NULL, 1, output_path, "[]", NULL, &out.text, e));
    FAILS(null, lycore_extract(NULL, base_path, output_path, NULL, NULL, &out.text, e));
    FAILS(null, lycore_extract(base_path, NULL, output_path, NULL, NULL, &out.text, e));
    FAILS(null, lycore_extract(base_path, base_path, NULL, NULL, NULL, &out.text, e));
    FAILS(bad, lycore_extract(base_path, base_path, output_path, "{\"rank\": -1}", NULL, &out.text, e));

    FAILS(null, lycore_network_new(NULL, &out.network, e));
    FAILS_NETWORK(null, lycore_network_new("{}", NULL, e));
    FAILS(bad, lycore_network_new(not_utf8, &out.network, e));
    FAILS_NETWORK(null, lycore_network_schema(NULL, e));
    FAILS_NETWORK(null, lycore_network_operator(NULL, e));
    FAILS_NETWORK(null, lycore_network_config(network, NULL, e));
    FAILS_NETWORK(null, lycore_network_needs_weight(network, 0, NULL, e));
    FAILS_NETWORK(null, lycore_network_add_layer(network, "new", NULL, &out.number, e));
    FAILS_NETWORK(null, lycore_network_adapter(network, NULL, NULL, e));
    FAILS_NETWORK(null, add_layer(network, NULL, weight_shape, 2, NULL, &out.number, e));
    FAILS_NETWORK(null, add_layer(network, "new", NULL, 2, NULL, &out.number, e));
    FAILS_NETWORK(null, add_layer(network, "new", weight_shape, 2, NULL, NULL, e));
    FAILS_NETWORK(bad, add_layer(network, not_utf8, weight_shape, 2, NULL, &out.number, e));
    FAILS_NETWORK(bad, add_layer(network, "new", weight_shape, UINT64_MAX, NULL, &out.number, e));
    FAILS_NETWORK(null, lycore_network_forward(network, 0, NULL, NULL, &y, NULL, e));
    FAILS_NETWORK(null, lycore_network_forward(network, 0, &x, NULL, NULL, NULL, e));
    FAILS_NETWORK(null, lycore_network_backward(network, 0, NULL, NULL, &y, NULL, NULL, e));
    FAILS_NETWORK(null, lycore_network_backward(network, 0, &x, NULL, NULL, NULL, NULL, e));
    FAILS_NETWORK(null, lycore_network_results(network, NULL, e));
    FAILS_NETWORK(null, lycore_network_buffer(network, LYCORE_BUFFER_PARAMETERS, NULL, e));
    uint64_t steps = 7;
    FAILS_NETWORK(null, lycore_network_progress(network, NULL, &steps, e));
    FAILS_NETWORK(null, lycore_network_progress(network, &steps, NULL, e));
    CHECK_EQUAL(steps, 7);
    FAILS_NETWORK(null, lycore_network_save(network, NULL, LYCORE_BUFFER_PARAMETERS, NULL, NULL, e));
    FAILS_NETWORK(bad, lycore_network_save(network, not_utf8, LYCORE_BUFFER_PARAMETERS, NULL, NULL, e));
    FAILS_NETWORK(bad, lycore_network_save(network, output_path, LYCORE_BUFFER_PARAMETERS, not_utf8, NULL, e));
    FAILS_NETWORK(bad, lycore_network_save(network, output_path, LYCORE_BUFFER_PARAMETERS, NULL, not_utf8, e));
    FAILS_NETWORK(null, lycore_network_save_state(network, NULL, e));
    FAILS_NETWORK(bad, lycore_network_save_state(network, not_utf8, e));
    FAILS_NETWORK(null, lycore_network_load_state(network, NULL, e));
    FAILS_NETWORK(bad, lycore_network_load_state(network, not_utf8, e));
    FAILS_NETWORK(null, lycore_network_load_weights(network, NULL, &out.number, e));
    FAILS_NETWORK(bad, lycore_network_load_weights(network, not_utf8, &out.number, e));
    UNTOUCHED();
    weights_are_the_base();
    CHECK(!exists(output_path));
}

// ---- Structs that say a wrong size -----------------------------------------------------------------------------------------------------------

static void struct_sizes(void) {
    const lycore_status bad = LYCORE_BAD_ARGUMENT;
    const lycore_adapter *const list[1] = {adapter};
    const char *const target = layers[PROJ].target;
    lycore_patch patch = patch_of(slots, factors, 3);
    lycore_strengths strengths = {.struct_size = 0, .unet = 1.0, .text_encoder = 1.0};
    lycore_progress progress = {.struct_size = 0, .callback = go_on};
    lycore_geometry geometry = {.struct_size = 0, .axes = 2};
    lycore_layer layer = {.struct_size = 0, .form = LYCORE_LAYER_SLIDING, .shape = weight_shape, .ndim = 2};
    for (int i = 0; i < 4; i++) {
        // 0, a size that is too small, too large, and nonsense.
        const uint64_t off = i == 0 ? 0 : i == 1 ? (uint64_t)-8 : i == 2 ? 8 : UINT64_MAX / 2;
#define WRONG(thing) ((thing).struct_size = i == 0 ? 0 : (uint64_t)sizeof(thing) + off)
        WRONG(out.module), WRONG(out.applied), WRONG(out.step);
        memcpy(&out_before, &out, sizeof out);
        WRONG(strengths), WRONG(progress), WRONG(geometry), WRONG(patch), WRONG(layer);
        FAILS(bad, lycore_adapter_module(adapter, 0, &out.module, e));
        FAILS(bad, lycore_stack_apply(stack, NULL, NULL, &out.applied, e));
        FAILS(bad, lycore_stack_apply(stack, NULL, &progress, NULL, e));
        FAILS(bad, lycore_stack_add_adapter(stack, adapter, &strengths, &out.number, e));
        FAILS(bad, lycore_stack_set_strengths(stack, 1, &strengths, e));
        FAILS(bad, lycore_stack_forward(stack, layers[CONV].target, &geometry, &conv_x, &conv_y, NULL, e));
        FAILS(bad, lycore_weight_merge(target, &weight, &patch, 1, NULL, e));
        FAILS(bad, lycore_checkpoint_merge(base_path, list, &strengths, 1, output_path, NULL, NULL, NULL, e));
        FAILS(bad, lycore_checkpoint_merge(base_path, list, NULL, 1, output_path, NULL, &progress, NULL, e));
        FAILS_NETWORK(bad, add_layer(network, "new", conv_shape, 4, &geometry, &out.number, e));
        FAILS_NETWORK(bad, lycore_network_add_layer(network, "new", &layer, &out.number, e));
        FAILS_NETWORK(bad, lycore_network_step(network, NULL, &out.step, e));
        FAILS_NETWORK(bad, lycore_network_results(network, &out.step, e));
        UNTOUCHED();
    }
    weights_are_the_base();
    CHECK(!exists(output_path));
}

// ---- Tensors that lie --------------------------------------------------------------------------------------------------------------------

// Calls that take a tensor, each once per argument.
enum { TARGET, FORWARD_X, FORWARD_Y, MERGED, PATCH, NET_X, NET_WEIGHT, NET_Y, BACK_X, BACK_WEIGHT, BACK_Y, BACK_GRAD_X, LAYER_WEIGHT, PLACES };

// A stack that still takes weights; `stack` has an adapter on it and takes none.
static lycore_stack *bare;

static lycore_status pass(int place, const lycore_tensor *given) {
    const char *const target = layers[PROJ].target;
    lycore_tensor list[3] = {*given, factors[1], factors[2]};
    const lycore_patch patch = patch_of(slots, list, 3), good = patch_of(slots, factors, 3);
    const lycore_layer layer = {.struct_size = sizeof layer, .form = LYCORE_LAYER_SLIDING, .shape = weight_shape, .ndim = 2, .weight = given};
    switch (place) {
    case TARGET: return lycore_stack_add_target(bare, "new", given, e);
    case FORWARD_X: return lycore_stack_forward(stack, target, NULL, given, &y, NULL, e);
    case FORWARD_Y: return lycore_stack_forward(stack, target, NULL, &x, given, NULL, e);
    case MERGED: return lycore_weight_merge(target, given, &good, 1, NULL, e);
    case PATCH: return lycore_weight_merge(target, &weight, &patch, 1, NULL, e);
    case NET_X: return lycore_network_forward(network, 0, given, NULL, &y, NULL, e);
    case NET_WEIGHT: return lycore_network_forward(network, 0, &x, given, &y, NULL, e);
    case NET_Y: return lycore_network_forward(network, 0, &x, NULL, given, NULL, e);
    case BACK_X: return lycore_network_backward(network, 0, given, NULL, &y, NULL, NULL, e);
    case BACK_WEIGHT: return lycore_network_backward(network, 0, &x, given, &y, NULL, NULL, e);
    case BACK_Y: return lycore_network_backward(network, 0, &x, NULL, given, NULL, NULL, e);
    case BACK_GRAD_X: return lycore_network_backward(network, 0, &x, NULL, &y, given, NULL, e);
    default: return lycore_network_add_layer(network, "new", &layer, &out.number, e);
    }
}

// Spoils a good tensor in one way; LYCORE_OK when there is no such way any more.
static lycore_status spoil(int fault, lycore_tensor *t) {
    static int64_t numbers[20];
    memset(numbers, 0, sizeof numbers);
    for (int i = 0; i < t->ndim; i++) numbers[i] = t->shape[i];
    switch (fault) {
    case 0: t->dtype.code = LYCORE_DTYPE_INT, t->dtype.bits = 8; return LYCORE_DTYPE;
    case 1: t->dtype.code = LYCORE_DTYPE_UINT, t->dtype.bits = 8; return LYCORE_DTYPE;
    case 2: t->dtype.code = LYCORE_DTYPE_INT; return LYCORE_DTYPE;
    case 3: t->dtype.bits = 64; return LYCORE_DTYPE;
    case 4: t->dtype.bits = 0; return LYCORE_DTYPE;
    case 5: t->dtype.code = LYCORE_DTYPE_BFLOAT; return LYCORE_DTYPE;  // of 32 bits
    case 6: t->dtype.code = 77; return LYCORE_DTYPE;
    case 7: t->dtype.lanes = 2; return LYCORE_DTYPE;
    case 8: t->dtype.lanes = 0; return LYCORE_DTYPE;
    case 9: t->ndim = -1; return LYCORE_BAD_ARGUMENT;
    case 10: t->ndim = 17, t->shape = numbers; return LYCORE_BAD_ARGUMENT;
    case 11: t->ndim = INT32_MIN; return LYCORE_BAD_ARGUMENT;
    case 12: t->ndim = INT32_MAX; return LYCORE_BAD_ARGUMENT;
    case 13: t->shape = NULL; return LYCORE_NULL_ARGUMENT;
    case 14: t->data = NULL; return LYCORE_NULL_ARGUMENT;
    case 15: t->device.device_type = 0; return LYCORE_BAD_ARGUMENT;
    case 16: t->device.device_type = 10; return LYCORE_BAD_ARGUMENT;  // DLPack's ROCm: not ours
    case 17: t->device.device_type = LYCORE_DEVICE_CUDA, t->device.device_id = -1; return LYCORE_BAD_ARGUMENT;
    case 18: t->shape = numbers, numbers[0] = -1; return LYCORE_BAD_ARGUMENT;
    case 19: t->shape = numbers, numbers[1] = INT64_MIN; return LYCORE_BAD_ARGUMENT;
    case 20: t->shape = numbers, numbers[0] = INT64_MAX; return LYCORE_BAD_ARGUMENT;
    case 21: t->shape = numbers, numbers[0] = numbers[1] = INT64_C(1) << 32; return LYCORE_BAD_ARGUMENT;
    case 22: t->strides = numbers, numbers[0] = 6, numbers[1] = -1; return LYCORE_BAD_ARGUMENT;
    case 23: t->strides = numbers, numbers[0] = INT64_MAX, numbers[1] = 1; return LYCORE_BAD_ARGUMENT;
    case 24: t->strides = numbers, numbers[0] = numbers[1] = INT64_C(1) << 61; return LYCORE_BAD_ARGUMENT;
    default: return LYCORE_OK;
    }
}

static const lycore_tensor *good_at(int place) {
    switch (place) {
    case TARGET: case MERGED: case NET_WEIGHT: case BACK_WEIGHT: case LAYER_WEIGHT: return &weight;
    case PATCH: return &factors[0];
    case FORWARD_Y: case NET_Y: case BACK_Y: return &y;
    default: return &x;
    }
}

static void tensors_that_lie(void) {
    lycore_status want = LYCORE_OK;
    WORKS(lycore_stack_new(LYCORE_BACKUP_HOST, &bare, e));
    for (int place = 0; place < PLACES; place++) {
        const lycore_tensor *const good = good_at(place);
        for (int fault = 0;; fault++) {
            lycore_tensor spoilt = *good;
            if ((want = spoil(fault, &spoilt)) == LYCORE_OK) break;
            const int before = check_failures;
            if (place >= NET_X) {
                FAILS_NETWORK(want, pass(place, &spoilt));
            } else {
                FAILS(want, pass(place, &spoilt));
            }
            if (check_failures > before) printf("  with place %d, fault %d\n", place, fault);
        }
    }
    // An offset that leads around the end of the address space. Where it would be followed it is not tried.
    lycore_tensor around = weight;
    around.byte_offset = UINT64_MAX - 3;
    FAILS(LYCORE_BAD_ARGUMENT, pass(TARGET, &around));

    if (!gpu) {
        // A tensor on a device that is not there. Its address would be followed if it were, so not with a GPU.
        for (int place = FORWARD_X; place < PLACES; place++) {
            lycore_tensor far = *good_at(place);
            const int before = check_failures;
            far.device.device_type = LYCORE_DEVICE_CUDA;
            if (place >= NET_X) {
                FAILS_NETWORK(LYCORE_DEVICE, pass(place, &far));
            } else {
                // Of a forward the other tensor is elsewhere, which may be noticed first.
                const bool forward = place == FORWARD_X || place == FORWARD_Y;
                FAILS_OR(LYCORE_DEVICE, forward ? LYCORE_BAD_ARGUMENT : LYCORE_DEVICE, pass(place, &far));
            }
            if (check_failures > before) printf("  with place %d\n", place);
        }
    }
    // None of them was taken: the name is still free.
    WORKS(lycore_stack_add_target(bare, "new", &weight, e));
    CHECK_EQUAL(lycore_stack_free(bare), LYCORE_OK);
    weights_are_the_base();
}

int main(void) {
    prepare();
    texts();
    handles();
    pointers();
    struct_sizes();
    tensors_that_lie();
    return finish("misuse.c");
}
