// Trains a LoRA on a model of this program's own, which is written with libtorch, and saves it.
//
//     make lib
//     T=$(.venv/bin/python -c 'import os, torch; print(os.path.dirname(torch.__file__))')
//     FLAGS="-Iinclude -isystem $T/include -isystem $T/include/torch/csrc/api/include -Ltarget/release -L$T/lib"
//     c++ -std=c++17 examples/train.cpp -o train $FLAGS -llycore -ltorch -ltorch_cpu -lc10 -Wl,-rpath,$PWD/target/release,-rpath,$T/lib
//     ./train .
//
// libtorch has the model, its forward pass and the graph of it. LyCore has what is trained: the adapters' parameters and gradients,
// the optimizer, the learning rate, the files. The model's own weights stay as they are.
// For `./train . cuda` link -Wl,--no-as-needed -ltorch_cuda too.

#include <lycore.h>

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/torch.h>

#include <cstdio>
#include <exception>
#include <optional>
#include <stdexcept>
#include <string>

namespace {

// Calls a function of the library. All take a place for an error last; what stands there becomes an exception.
template <class Function, class... Arguments>
void call(Function function, Arguments... arguments) {
    lycore_error *error = nullptr;
    if (function(arguments..., &error) == LYCORE_OK) return;
    const std::string text = std::string(lycore_error_message(error)) + "\n" + lycore_error_hint(error);
    lycore_error_free(error);
    throw std::runtime_error(text);
}

// A LoRA module for each layer that is added. It must outlive the graphs of its forward passes.
class Adapters {
public:
    // `config` is JSON with the names of sd-scripts; lycore_network_schema tells them all.
    explicit Adapters(const char *config) {
        call(lycore_network_new, config, &network_);
        // The library's forward and backward are an operator of libtorch, so that autograd records them as any other.
        char *name = nullptr;
        call(lycore_network_operator, &name);
        operator_ = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Operator>();
        lycore_text_free(name);
    }
    ~Adapters() { lycore_network_free(network_); }
    Adapters(const Adapters &) = delete;
    Adapters &operator=(const Adapters &) = delete;
    lycore_network *get() const { return network_; }

    // Describes a layer by its weight, [out, in] or [out, in, kernel..]. `name` stands in the file, as lora_unet_ and the name.
    // Returns the module's number. A config may leave layers out; the one below does not.
    uint64_t add(const char *name, const torch::Tensor &weight, bool has_bias, const lycore_geometry *geometry = nullptr) {
        lycore_layer layer{};
        layer.struct_size = sizeof layer;
        layer.form = LYCORE_LAYER_SLIDING;
        layer.has_bias = has_bias;
        layer.shape = weight.sizes().data();
        layer.ndim = static_cast<uint64_t>(weight.dim());
        layer.geometry = geometry;
        uint64_t number = LYCORE_NO_MODULE;
        call(lycore_network_add_layer, network_, name, &layer, &number);
        return number;
    }

    // Allocates the parameters; no layer can be added after it.
    void build(const torch::Device &device) {
        call(lycore_network_build, network_, lycore_device{device.is_cuda() ? LYCORE_DEVICE_CUDA : LYCORE_DEVICE_CPU, 0});
    }

    // y + what the module adds for x. `axes`: the spatial axes of a convolution, else 0.
    torch::Tensor forward(uint64_t number, const torch::Tensor &x, const torch::Tensor &y, int64_t axes) const {
        // No layer's weight: a LoRA computes without it. Nobody else has y, so the sum may take its memory.
        return operator_->call(anchor_, x, y, std::nullopt, reinterpret_cast<int64_t>(network_), static_cast<int64_t>(number), axes, true);
    }

private:
    using Tensor = const at::Tensor &;
    using Operator = at::Tensor(Tensor, Tensor, Tensor, const std::optional<at::Tensor> &, int64_t, int64_t, int64_t, bool);
    lycore_network *network_ = nullptr;
    std::optional<c10::TypedOperatorHandle<Operator>> operator_;
    // Autograd goes back through what depends on a tensor that needs a gradient. This stands for the parameters, which it does not know.
    torch::Tensor anchor_ = torch::zeros({}, torch::requires_grad());
};

// Any model: its layers are called through `adapted`.
struct Model : torch::nn::Module {
    torch::nn::Conv2d conv = register_module("conv", torch::nn::Conv2d(torch::nn::Conv2dOptions(3, 16, 3).padding(1)));
    torch::nn::Linear first = register_module("first", torch::nn::Linear(16, 64));
    torch::nn::Linear last = register_module("last", torch::nn::Linear(64, 8));
    const Adapters *adapters = nullptr;  // without them it is the model as it was

    torch::Tensor forward(const torch::Tensor &pictures) {
        torch::Tensor x = torch::silu(adapted(0, conv->forward(pictures), pictures, 2)).mean({2, 3});
        x = torch::silu(adapted(1, first->forward(x), x, 0));
        return adapted(2, last->forward(x), x, 0);
    }

    torch::Tensor adapted(uint64_t number, const torch::Tensor &y, const torch::Tensor &x, int64_t axes) const {
        return adapters == nullptr ? y : adapters->forward(number, x, y, axes);
    }
};

void train(const std::string &folder, const torch::Device &device) {
    torch::manual_seed(0);
    Model model;
    model.to(device);
    for (torch::Tensor &weight : model.parameters()) weight.requires_grad_(false);

    Adapters adapters(R"({"network_dim": 8, "network_alpha": 8, "learning_rate": 0.01, "output_name": "example"})");
    const int64_t padding[] = {1, 1};
    lycore_geometry geometry{};
    geometry.struct_size = sizeof geometry;
    geometry.axes = 2;
    geometry.padding = padding;
    adapters.add("conv", model.conv->weight, true, &geometry);
    adapters.add("first", model.first->weight, true);
    adapters.add("last", model.last->weight, true);
    adapters.build(device);
    model.adapters = &adapters;
    std::printf("%llu parameters\n", static_cast<unsigned long long>(lycore_network_parameter_count(adapters.get())));

    // Something to learn: the brightness of the colours.
    const torch::Tensor pictures = torch::rand({64, 3, 16, 16}, device);
    const torch::Tensor goal = pictures.mean({2, 3}).repeat({1, 3}).narrow(1, 0, 8);
    for (int i = 1; i <= 200; i++) {
        const torch::Tensor loss = torch::mse_loss(model.forward(pictures), goal);
        loss.backward();
        // Clips the gradients, updates the parameters, clears the gradients. NULL: on libtorch's current stream.
        lycore_step done{};
        done.struct_size = sizeof done;
        call(lycore_network_step, adapters.get(), nullptr, &done);
        if (i == 1 || i % 50 == 0) std::printf("step %d: loss %.6f, gradient %.4f\n", i, loss.item<double>(), done.gradient_norm);
    }

    // The file is one that every program reads which reads LoRA; with the state this run could go on, bit for bit.
    const std::string file = folder + "/example.safetensors";
    call(lycore_network_save, adapters.get(), file.c_str(), LYCORE_BUFFER_PARAMETERS, "fp16", nullptr);
    call(lycore_network_save_state, adapters.get(), (folder + "/example.state").c_str());
    lycore_adapter *saved = nullptr;
    call(lycore_adapter_open, file.c_str(), &saved);
    std::printf("%llu modules in %s\n", static_cast<unsigned long long>(lycore_adapter_module_count(saved)), file.c_str());
    lycore_adapter_free(saved);
}

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: %s FOLDER [cuda]\n", argv[0]);
        return 2;
    }
    try {
        train(argv[1], torch::Device(argc > 2 ? argv[2] : "cpu"));
    } catch (const std::exception &problem) {
        std::fprintf(stderr, "%s\n", problem.what());
        return 1;
    }
}
