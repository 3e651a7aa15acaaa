// A host in C++17: handles that free themselves, exceptions from errors, callbacks that may throw, and the calls from several threads.
// The numbers are host.c's business; here they are compared where threads could spoil them.

#include "check.h"
#include "fixture.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace fs = std::filesystem;

// ---- The wrapper: all that a C++ host needs ----------------------------------------------------------------------------------------------

namespace lycore {

// A failed call as an exception. It copies the texts, since they live only as long as the error object.
class Error : public std::runtime_error {
public:
    Error(lycore_status status, const lycore_error *error)
        : std::runtime_error(lycore_error_message(error)),
          status(status),
          hint(lycore_error_hint(error)),
          key(lycore_error_key(error)),
          file(lycore_error_file(error)) {}
    lycore_status status;
    std::string hint, key, file;
};

template <auto free>
struct Free {
    template <class T>
    void operator()(T *handle) const noexcept {
        free(handle);
    }
};
template <class T, auto free>
using Owned = std::unique_ptr<T, Free<free>>;

using Adapter = Owned<lycore_adapter, lycore_adapter_free>;
using Cancel = Owned<lycore_cancel, lycore_cancel_free>;
using Network = Owned<lycore_network, lycore_network_free>;
using Stack = Owned<lycore_stack, lycore_stack_free>;
using Text = Owned<char, lycore_text_free>;
using ErrorHandle = Owned<lycore_error, lycore_error_free>;

// Calls a function of the library and throws what it says.
template <class Function, class... Arguments>
void call(Function function, Arguments... arguments) {
    lycore_error *raw = nullptr;
    const lycore_status status = function(arguments..., &raw);
    const ErrorHandle error(raw);
    if (status != LYCORE_OK) throw Error(status, raw);
}

// The same for a function whose last argument but one receives a handle or a text.
template <class Handle, class Function, class... Arguments>
Handle make(Function function, Arguments... arguments) {
    typename Handle::pointer raw = nullptr;
    call(function, arguments..., &raw);
    return Handle(raw);
}

// A progress callback as a std::function. An exception must not pass through the library, so it waits here until the call is over.
class Progress {
public:
    using Report = std::function<bool(uint64_t done, uint64_t total)>;
    explicit Progress(Report report, const lycore_cancel *cancel = nullptr) : report_(std::move(report)) {
        raw_.struct_size = sizeof raw_;
        raw_.callback = [](void *self, uint64_t done, uint64_t total) noexcept { return static_cast<Progress *>(self)->at(done, total); };
        raw_.user_data = this;
        raw_.cancel = cancel;
    }
    Progress(const Progress &) = delete;
    Progress &operator=(const Progress &) = delete;
    const lycore_progress *get() const { return &raw_; }
    void rethrow() const {
        if (thrown_) std::rethrow_exception(thrown_);
    }

private:
    bool at(uint64_t done, uint64_t total) noexcept {
        try {
            return report_(done, total);
        } catch (...) {
            thrown_ = std::current_exception();
            return false;
        }
    }
    Report report_;
    std::exception_ptr thrown_;
    lycore_progress raw_{};
};

// A row-major tensor in host memory, with the shape that its descriptor points to.
class Tensor {
public:
    Tensor(float *data, std::vector<int64_t> shape) : shape_(std::move(shape)) {
        raw_.data = data;
        raw_.device.device_type = LYCORE_DEVICE_CPU;
        raw_.ndim = static_cast<int32_t>(shape_.size());
        raw_.dtype = {LYCORE_DTYPE_FLOAT, 32, 1};
        raw_.shape = shape_.data();
    }
    Tensor(const Tensor &) = delete;
    Tensor &operator=(const Tensor &) = delete;
    const lycore_tensor *get() const { return &raw_; }

private:
    std::vector<int64_t> shape_;
    lycore_tensor raw_{};
};

}  // namespace lycore

// ---- The tests ---------------------------------------------------------------------------------------------------------------------------

namespace {

// Threads wait for each other with this instead of sleeping.
class Signal {
public:
    void raise() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            raised_ = true;
        }
        changed_.notify_all();
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex_);
        changed_.wait(lock, [this] { return raised_; });
    }

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool raised_ = false;
};

// The status of a call that the wrapper turns into an exception.
template <class Work>
lycore_status status_of(Work work) {
    try {
        work();
    } catch (const lycore::Error &e) {
        CHECK(e.what()[0] != '\0');
        return e.status;
    }
    return LYCORE_OK;
}

std::set<std::string> names_in(const fs::path &folder) {
    std::set<std::string> names;
    for (const auto &entry : fs::directory_iterator(folder)) names.insert(entry.path().filename().string());
    return names;
}

const layer &proj = layers[PROJ];

// A stack with one Linear weight of its own and the adapter on it.
struct Model {
    std::vector<float> weight, base;
    lycore::Tensor tensor;
    lycore::Stack stack;
    uint64_t id = 0;

    Model(const std::vector<float> &values, const lycore_adapter *adapter)
        : weight(values), base(values), tensor(weight.data(), {8, 6}), stack(lycore::make<lycore::Stack>(lycore_stack_new, LYCORE_BACKUP_HOST)) {
        lycore::call(lycore_stack_add_target, stack.get(), proj.target, tensor.get());
        lycore::call(lycore_stack_add_adapter, stack.get(), adapter, nullptr, &id);
    }

    void apply(double strength, const lycore_progress *progress = nullptr) {
        lycore_strengths strengths{};
        strengths.struct_size = sizeof strengths;
        strengths.unet = strength;
        lycore::call(lycore_stack_set_strengths, stack.get(), id, &strengths);
        lycore::call(lycore_stack_apply, stack.get(), nullptr, progress, nullptr);
    }
};

std::vector<float> numbers(size_t count) {
    std::vector<float> values(count);
    fixture_fill(values.data(), static_cast<int64_t>(count));
    return values;
}

void errors_are_exceptions(const fs::path &folder) {
    const std::string missing = (folder / "no-such-file.safetensors").string();
    try {
        lycore::make<lycore::Adapter>(lycore_adapter_open, missing.c_str());
        CHECK(!"opened a file that is not there");
    } catch (const lycore::Error &e) {
        CHECK_EQUAL(e.status, LYCORE_FILE);
        CHECK_CONTAINS(e.what(), "no-such-file");
        CHECK(e.file == missing);
        CHECK(!e.hint.empty());
    }
}

void merge_and_restore(const lycore_adapter *adapter) {
    Model model(numbers(48), adapter);
    double delta[MAX_ELEMENTS];
    fixture_delta(&proj, delta);
    model.apply(0.7);
    for (size_t i = 0; i < 48; i++) {
        const double want = static_cast<double>(model.base[i]) + 0.7 * delta[i];
        CHECK_NEAR(static_cast<double>(model.weight[i]), want, 1e-6 * (std::fabs(static_cast<double>(model.base[i])) + std::fabs(delta[i])));
    }
    lycore::call(lycore_stack_restore, model.stack.get(), nullptr);
    CHECK(model.weight == model.base);

    // An exception from a callback comes out behind the call; the weights are the base.
    const lycore::Progress progress([](uint64_t, uint64_t) -> bool { throw std::logic_error("not today"); });
    CHECK_EQUAL(status_of([&] { model.apply(0.3, progress.get()); }), LYCORE_CANCELLED);
    CHECK(model.weight == model.base);
    try {
        progress.rethrow();
        CHECK(!"the exception was lost");
    } catch (const std::logic_error &e) {
        CHECK_TEXT(e.what(), "not today");
    }
}

// Two threads, each with weights of its own, share one adapter; each result must be the one that a single thread gets.
void two_threads_use_one_adapter(const lycore_adapter *adapter) {
    const std::vector<float> values = numbers(48);
    const auto strength = [](int round) { return 0.01 * round - 0.5; };
    constexpr int rounds = 100;
    std::vector<std::vector<float>> want;
    {
        Model model(values, adapter);
        for (int i = 0; i < rounds; i++) {
            model.apply(strength(i));
            want.push_back(model.weight);
        }
    }
    std::atomic<int> wrong{0}, failed{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 2; t++) {
        threads.emplace_back([&] {
            try {
                for (int i = 0; i < rounds; i++) {
                    // A new stack each time: binding reads all of the adapter.
                    Model model(values, adapter);
                    model.apply(strength(i));
                    if (model.weight != want[static_cast<size_t>(i)]) wrong++;
                    const lycore::Text report = lycore::make<lycore::Text>(lycore_adapter_report, adapter);
                    if (lycore_adapter_module_count(adapter) != LAYERS) wrong++;
                }
            } catch (const std::exception &) {
                failed++;
            }
        });
    }
    for (std::thread &thread : threads) thread.join();
    CHECK_EQUAL(wrong.load(), 0);
    CHECK_EQUAL(failed.load(), 0);
}

// While one thread is inside apply, every call of another on the same stack answers BUSY and does nothing; other objects are free.
void a_stack_serves_one_call_at_a_time(const lycore_adapter *adapter) {
    const std::vector<float> values = numbers(48);
    Model model(values, adapter), other(values, adapter), spare(values, adapter);
    Signal inside, leave;
    lycore_status from_callback = LYCORE_OK, result = LYCORE_PANIC;
    const lycore::Progress hold([&](uint64_t done, uint64_t) {
        if (done == 0) {
            // Also the thread that is inside gets BUSY, instead of a deadlock.
            from_callback = lycore_stack_restore(model.stack.get(), nullptr, nullptr);
            inside.raise();
            leave.wait();
        }
        return true;
    });
    std::thread worker([&] { result = status_of([&] { model.apply(0.7, hold.get()); }); });
    inside.wait();

    lycore_stack *busy = model.stack.get();
    std::vector<float> more(48), x(6), y(8);
    const lycore::Tensor target(more.data(), {8, 6}), x_tensor(x.data(), {6}), y_tensor(y.data(), {8});
    uint64_t id = 77;
    char *text = nullptr;
    std::vector<lycore_status> answers;
    const auto ask = [&](auto function, auto... arguments) {
        answers.push_back(status_of([&] { lycore::call(function, arguments...); }));
    };
    ask(lycore_stack_apply, busy, nullptr, nullptr, nullptr);
    ask(lycore_stack_restore, busy, nullptr);
    ask(lycore_stack_forward, busy, proj.target, nullptr, x_tensor.get(), y_tensor.get(), nullptr);
    ask(lycore_stack_set_strengths, busy, model.id, nullptr);
    ask(lycore_stack_add_adapter, busy, adapter, nullptr, &id);
    ask(lycore_stack_remove_adapter, busy, model.id);
    ask(lycore_stack_add_target, busy, "another", target.get());
    ask(lycore_stack_add_alias, busy, "spelling", proj.target, nullptr);
    ask(lycore_stack_report, busy, model.id, &text);
    for (const lycore_status answer : answers) CHECK_EQUAL(answer, LYCORE_BUSY);
    CHECK_EQUAL(answers.size(), 9);
    CHECK(id == 77 && text == nullptr);
    const bool untouched = model.weight == model.base;
    other.apply(0.7);
    leave.raise();
    worker.join();
    CHECK(untouched);
    CHECK_EQUAL(from_callback, LYCORE_BUSY);
    CHECK_EQUAL(result, LYCORE_OK);
    CHECK(model.weight == other.weight && model.weight != model.base);

    // A handle freed during a call: the call ends as if nothing had happened, then the handle is dead.
    Signal inside_again, leave_again;
    const lycore::Progress hold_again([&](uint64_t done, uint64_t) {
        if (done == 0) {
            inside_again.raise();
            leave_again.wait();
        }
        return true;
    });
    lycore_stack *freed = spare.stack.release();
    std::thread second([&] { result = lycore_stack_apply(freed, nullptr, hold_again.get(), nullptr, nullptr); });
    inside_again.wait();
    const lycore_status free_status = lycore_stack_free(freed);
    const lycore_status dead = lycore_stack_restore(freed, nullptr, nullptr);
    leave_again.raise();
    second.join();
    CHECK_EQUAL(free_status, LYCORE_OK);
    CHECK_EQUAL(dead, LYCORE_BAD_HANDLE);
    CHECK_EQUAL(result, LYCORE_OK);
    CHECK(spare.weight != spare.base);
}

// A base of 200 MB: zeros that no disk holds, and one weight that the adapter changes.
void write_large_base(const fs::path &path) {
    const st_tensor tensors[] = {
        {"blocks.0.filler", "F32", 2, {5000, 10000, 0, 0, 0}, nullptr},
        {proj.target, "F32", 2, {8, 6, 0, 0, 0}, nullptr},
    };
    size_t header_size = 0;
    char *header = st_header(tensors, 2, &header_size);
    st_write_bytes(path.string().c_str(), header, header_size);
    free(header);
    fs::resize_file(path, header_size + st_bytes(&tensors[0]) + st_bytes(&tensors[1]));
}

// One thread merges a file, another stops it.
void cancel_a_merge(const lycore_adapter *adapter, const fs::path &folder) {
    const std::string base = (folder / "base.safetensors").string(), output = (folder / "merged.safetensors").string();
    write_large_base(base);
    const std::set<std::string> before = names_in(folder);
    const lycore::Cancel cancel = lycore::make<lycore::Cancel>(lycore_cancel_new);

    Signal started, cancelled;
    uint64_t last = 0, all = 0;
    const lycore::Progress progress(
        [&](uint64_t done, uint64_t total) {
            last = done;
            all = total;
            started.raise();
            // The other thread asks while this one copies; on a machine that is too busy to let it, the copying waits here.
            if (done >= total / 2) cancelled.wait();
            return true;
        },
        cancel.get());
    std::thread stopper([&] {
        started.wait();
        lycore_cancel_request(cancel.get());
        cancelled.raise();
    });
    const auto merge = [&](const lycore_progress *watch) {
        lycore::call(lycore_checkpoint_merge, base.c_str(), &adapter, nullptr, uint64_t{1}, output.c_str(), nullptr, watch, nullptr);
    };
    const lycore_status status = status_of([&] { merge(progress.get()); });
    stopper.join();
    CHECK_EQUAL(status, LYCORE_CANCELLED);
    CHECK_EQUAL(all, 4 * (5000 * 10000 + 8 * 6));
    CHECK(last < all);
    // No output, and nothing half written under another name.
    CHECK(names_in(folder) == before);

    // The flag stays up for the next call; lowered, it lets one through. An old output survives a cancelled merge.
    st_write_bytes(output.c_str(), "old", 3);
    CHECK_EQUAL(status_of([&] { merge(progress.get()); }), LYCORE_CANCELLED);
    CHECK_EQUAL(fs::file_size(output), 3);
    lycore_cancel_reset(cancel.get());
    merge(progress.get());
    CHECK_EQUAL(last, all);

    size_t size = 0;
    unsigned char *file = st_read(output.c_str(), &size);
    const st_tensor merged = {proj.target, "F32", 2, {8, 6, 0, 0, 0}, nullptr};
    std::vector<float> weight(48);
    memcpy(weight.data(), st_find(file, &merged), 4 * weight.size());
    free(file);
    double delta[MAX_ELEMENTS];
    fixture_delta(&proj, delta);
    for (size_t i = 0; i < weight.size(); i++) CHECK_NEAR(static_cast<double>(weight[i]), delta[i], 1e-6);
    std::set<std::string> after = before;
    after.insert("merged.safetensors");
    CHECK(names_in(folder) == after);
    fs::remove(output);
    fs::remove(base);
}

// The host's half of a training step, and that the loss falls.
void train(const fs::path &folder) {
    lycore::Network network;
    const lycore_status status = status_of([&] {
        network = lycore::make<lycore::Network>(
            lycore_network_new, R"({"network_dim": 4, "learning_rate": 0.05, "max_grad_norm": 0, "optimizer_args": {"weight_decay": 0}})");
    });
    if (status == LYCORE_UNSUPPORTED) return;
    CHECK_EQUAL(status, LYCORE_OK);
    const int64_t shape[] = {3, 5};
    uint64_t module = 0;
    lycore::call(add_layer, network.get(), "blocks.0.proj", shape, uint64_t{2}, nullptr, &module);
    lycore::call(lycore_network_build, network.get(), lycore_device{LYCORE_DEVICE_CPU, 0});

    std::vector<float> x = numbers(8 * 5), teacher = numbers(3 * 5), y(8 * 3), grad(8 * 3);
    const lycore::Tensor x_tensor(x.data(), {8, 5}), y_tensor(y.data(), {8, 3}), grad_tensor(grad.data(), {8, 3});
    double first = 0, last = 0;
    for (int step = 0; step < 50; step++) {
        // This model's base is zero: the adapter learns all of the teacher.
        y.assign(y.size(), 0.0f);
        lycore::call(lycore_network_forward, network.get(), module, x_tensor.get(), nullptr, y_tensor.get(), nullptr);
        last = 0;
        for (size_t n = 0; n < 8; n++) {
            for (size_t o = 0; o < 3; o++) {
                float wanted = 0;
                for (size_t i = 0; i < 5; i++) wanted += x[n * 5 + i] * teacher[o * 5 + i];
                const float off = y[n * 3 + o] - wanted;
                last += static_cast<double>(off * off);
                grad[n * 3 + o] = 2 * off;
            }
        }
        if (step == 0) first = last;
        lycore::call(lycore_network_backward, network.get(), module, x_tensor.get(), nullptr, grad_tensor.get(), nullptr, nullptr);
        lycore::call(lycore_network_step, network.get(), nullptr, nullptr);
    }
    CHECK(last < first / 10);

    // A file saved in fp16 opens as an adapter with the rank that was trained.
    const std::string path = (folder / "trained.safetensors").string();
    lycore::call(lycore_network_save, network.get(), path.c_str(), LYCORE_BUFFER_PARAMETERS, "fp16", nullptr);
    const lycore::Adapter adapter = lycore::make<lycore::Adapter>(lycore_adapter_open, path.c_str());
    lycore_module described{};
    described.struct_size = sizeof described;
    lycore::call(lycore_adapter_module, adapter.get(), uint64_t{0}, &described);
    CHECK_TEXT(described.name, "lora_unet_blocks_0_proj");
    CHECK_EQUAL(described.rank, 4);
    fs::remove(path);
}

}  // namespace

int main() {
    const fs::path folder = fs::temp_directory_path() / ("lycore-host-cpp-" + std::to_string(std::random_device{}()));
    fs::create_directories(folder);
    fixture_make();
    try {
        const std::string path = (folder / "adapter.safetensors").string();
        fixture_write(path.c_str());
        const lycore::Adapter adapter = lycore::make<lycore::Adapter>(lycore_adapter_open, path.c_str());
        errors_are_exceptions(folder);
        merge_and_restore(adapter.get());
        two_threads_use_one_adapter(adapter.get());
        a_stack_serves_one_call_at_a_time(adapter.get());
        cancel_a_merge(adapter.get(), folder);
        train(folder);
        fs::remove(path);
    } catch (const lycore::Error &e) {
        printf("host.cpp: %s: %s (%s)\n", lycore_status_text(e.status), e.what(), e.hint.c_str());
        return 1;
    }
    // Remove refuses a folder that still holds something.
    CHECK(fs::remove(folder));
    return check_end("host.cpp");
}
