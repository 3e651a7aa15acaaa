// The little C++ that tch does not bind. Plain C functions; no exception leaves them: a failure is a text, freed by the caller.

#include <ATen/Context.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addmm.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/library.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

namespace {

char* text_of(const char* what) {
  char* copy = new (std::nothrow) char[std::strlen(what) + 1];
  if (copy != nullptr) std::strcpy(copy, what);
  return copy;
}

// Does the work; what it throws becomes a text.
template <class Work>
char* told(Work work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& e) {
    return text_of(e.what());
  } catch (...) {
    return text_of("unknown C++ exception");
  }
}

// Convolutions on a GPU ask a process-wide setting instead of NoTF32Guard, also in their backward on another thread. The first user switches TF32
// off and the last one puts the host's setting back, so that calls on several threads cannot leave each other's value behind.
class ExactConvolutions {
 public:
  ExactConvolutions() {
    std::lock_guard<std::mutex> guard(lock);
    if (users == 0) {
      at::Context& context = at::globalContext();
      cudnn = context.allowTF32CuDNN(at::Float32Op::CONV);
      // The old setter changes the new, finer settings too.
      convolution = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV);
      recurrent = context.float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN);
      context.setAllowTF32CuDNN(false);
    }
    users++;
  }

  ~ExactConvolutions() {
    std::lock_guard<std::mutex> guard(lock);
    if (--users > 0) return;
    try {
      at::Context& context = at::globalContext();
      context.setAllowTF32CuDNN(cudnn);
      context.setFloat32Precision(at::Float32Backend::CUDA, at::Float32Op::CONV, convolution);
      context.setFloat32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN, recurrent);
    } catch (...) {
      // These values were the process's own a moment ago; there is nobody left to tell.
    }
  }

  ExactConvolutions(const ExactConvolutions&) = delete;

 private:
  static inline std::mutex lock;
  static inline int users = 0;
  static inline bool cudnn = false;
  static inline at::Float32Precision convolution = at::Float32Precision::NONE, recurrent = at::Float32Precision::NONE;
};

// What a scope changed in the calling thread's libtorch state.
struct Scope {
  at::NoTF32Guard exact;
  // A host inside torch.autocast must not change the dtypes that this library computes in.
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
  std::optional<ExactConvolutions> exact_convolutions;
  bool has_stream = false;
  void* handle = nullptr;
  c10::Stream previous{c10::Stream::DEFAULT, c10::Device(c10::DeviceType::CPU)};
};

// The cudaStream_t that the calling thread's work on a CUDA device goes to.
void* current_stream(int device) {
  c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
  return guard.getStream(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device))).native_handle();
}

// A tensor's last axis as columns and all others as rows, or turned.
at::Tensor matrix(const at::Tensor& t, bool turned) {
  at::Tensor flat = t.dim() == 2 ? t : t.reshape({-1, t.size(-1)});
  return turned ? flat.t() : flat;
}

// What the operator calls for a module's forward and backward: a text is an error, freed with lycore_ext_free_text's counterpart in Rust.
struct Calls {
  char* (*forward)(int64_t network, int64_t index, at::Tensor* x, at::Tensor* weight, at::Tensor* y);
  char* (*backward)(int64_t network, int64_t index, at::Tensor* x, at::Tensor* weight, at::Tensor* grad_y, bool want_input, at::Tensor** grad_x);
  void (*free_text)(char* text);
};
Calls calls;

void check(char* failure) {
  if (failure == nullptr) return;
  std::string text(failure);
  calls.free_text(failure);
  throw std::runtime_error(text);
}

// A product of two tensors that its own node in the graph keeps. A gated layer's output is one, and the largest of a transformer block: computed
// again in backward, it need not be kept for the module that takes it as its input.
struct Product : torch::CustomClassHolder {
  explicit Product(std::shared_ptr<torch::autograd::Node> node) : node(std::move(node)) {}
  std::shared_ptr<torch::autograd::Node> node;

  // The node that made x, if x can be computed again from what the node keeps, to the same bits. Where somebody packs saved tensors away (a
  // checkpoint does, and unpacks them once only) x is kept as it is.
  static c10::intrusive_ptr<Product> of(const at::Tensor& x) {
    if (!x.is_contiguous() || x.is_view() || at::SavedTensorDefaultHooks::get_hooks() || !x.grad_fn() || x.grad_fn()->name() != "MulBackward0") return {};
    auto product = c10::make_intrusive<Product>(x.grad_fn());
    auto [a, b] = product->factors();
    bool whole = a.defined() && b.defined() && a.sizes() == x.sizes() && b.sizes() == x.sizes();
    if (!whole || a.scalar_type() != x.scalar_type() || b.scalar_type() != x.scalar_type()) return {};
    return product;
  }

  std::pair<at::Tensor, at::Tensor> factors() const {
    auto* mul = static_cast<torch::autograd::generated::MulBackward0*>(node.get());
    return {mul->self_.unpack(), mul->other_.unpack()};
  }

  at::Tensor again() const {
    at::NoGradGuard no_grad;
    auto [a, b] = factors();
    return at::mul(a, b);
  }
};

// `y = base + module(x)` in libtorch's graph. The anchor needs a gradient, so that backward runs also when neither x nor base does. `axes` are
// the spatial axes of a convolution's input: without its batch it gets one. `fresh`: nobody else reads base, so that y may take its memory.
class Module : public torch::autograd::Function<Module> {
 public:
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& anchor, const at::Tensor& given, const at::Tensor& base,
                            const std::optional<at::Tensor>& weight, int64_t network, int64_t index, int64_t axes, bool fresh) {
    at::Tensor x = given.contiguous();
    // An alias with a version counter of its own: base is an output that its producer does not keep.
    at::Tensor y = fresh && base.is_contiguous() ? base.variable_data() : base.detach().clone(at::MemoryFormat::Contiguous);
    bool single = axes > 0 && x.dim() == axes + 1;
    at::Tensor rows = single ? x.detach().unsqueeze(0) : x.detach(), out = single ? y.unsqueeze(0) : y;
    at::Tensor own = weight.value_or(at::Tensor());
    check(calls.forward(network, index, &rows, own.defined() ? &own : nullptr, &out));
    if (auto product = Product::of(given)) {
      ctx->saved_data["product"] = at::IValue::make_capsule(product);
      x = at::Tensor();
    }
    ctx->save_for_backward({x, own});
    ctx->saved_data["network"] = network;
    ctx->saved_data["index"] = index;
    ctx->saved_data["single"] = single;
    return y;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, const torch::autograd::variable_list& gradients) {
    if (at::GradMode::is_enabled()) throw std::runtime_error("LyCore: modules cannot be differentiated twice");
    torch::autograd::variable_list saved = ctx->get_saved_variables();
    auto product = ctx->saved_data.find("product");
    at::Tensor x = product == ctx->saved_data.end() ? saved[0].detach() : static_cast<Product&>(*product->second.toCapsule()).again();
    at::Tensor grad_y = gradients[0].contiguous(), weight = saved[1], grad_x;
    at::Tensor rows = x, out = grad_y;
    bool single = ctx->saved_data["single"].toBool(), want_input = ctx->needs_input_grad(1);
    if (single) {
      rows = x.unsqueeze(0);
      out = grad_y.unsqueeze(0);
    }
    at::Tensor* input = nullptr;
    check(calls.backward(ctx->saved_data["network"].toInt(), ctx->saved_data["index"].toInt(), &rows, weight.defined() ? &weight : nullptr, &out,
                         want_input, &input));
    if (input != nullptr) {
      grad_x = (single ? input->squeeze(0) : *input).to(x.scalar_type());
      delete input;
    }
    at::Tensor none;
    return {none, grad_x, ctx->needs_input_grad(2) ? gradients[0] : none, none, none, none, none, none};
  }
};

at::Tensor module(const at::Tensor& anchor, const at::Tensor& x, const at::Tensor& base, const std::optional<at::Tensor>& weight, int64_t network,
                  int64_t index, int64_t axes, bool fresh) {
  return Module::apply(anchor, x, base, weight, network, index, axes, fresh);
}

}  // namespace

extern "C" {

// out = beta * out + alpha * a @ b, a and b turned where it says so; leading axes are rows. out may be fp32 beside factors of 16 bits.
char* lycore_ext_product(at::Tensor* out, const at::Tensor* a, bool turn_a, const at::Tensor* b, bool turn_b, double beta, double alpha) {
  return told([&] {
    at::Tensor to = matrix(*out, false), left = matrix(*a, turn_a), right = matrix(*b, turn_b);
    if (!to.is_alias_of(*out)) throw std::invalid_argument("the result of a product is not row-major");
    if (to.scalar_type() == left.scalar_type()) {
      at::addmm_out(to, to, left, right, beta, alpha);
    } else if (to.is_cuda() && to.scalar_type() == at::kFloat) {
      at::addmm_out(to, to, left, right, at::kFloat, beta, alpha);
    } else {
      at::Tensor sum = at::mm(left, right);
      // As in addmm: with a beta of 0, whatever is there before, NaN too, does not count.
      (beta == 0 ? to.zero_() : to.mul_(beta)).add_(sum, alpha);
    }
  });
}

// a @ b, as in lycore_ext_product; the caller owns the result.
char* lycore_ext_multiply(const at::Tensor* a, bool turn_a, const at::Tensor* b, bool turn_b, at::Tensor** out) {
  return told([&] {
    *out = new at::Tensor(at::mm(matrix(*a, turn_a), matrix(*b, turn_b)));
  });
}

// Makes `NAMESPACE::module` an operator of libtorch, once; the calls are this library's own.
char* lycore_ext_register(const char* name, Calls given) {
  return told([&] {
    calls = given;
    // Never freed: operators live as long as the process. Static, so that leak checkers see that it is held.
    static auto* const library = new torch::Library(torch::Library::DEF, name, std::nullopt, __FILE__, __LINE__);
    library->def(
        "module(Tensor anchor, Tensor x, Tensor base, Tensor? weight, int network, int index, int axes, bool fresh) -> Tensor",
        torch::dispatch(c10::DispatchKey::CompositeImplicitAutograd, TORCH_FN(module)));
  });
}

// An address inside libtorch's CPU half.
void* lycore_ext_libtorch_address() { return reinterpret_cast<void*>(&at::globalContext); }

void lycore_ext_free_text(char* text) { delete[] text; }

// Opens a scope in which fp32 products are exact (no TF32) and autocast is off. device is a CUDA device or -1 for the CPU; unless stream is NULL,
// work goes to this cudaStream_t.
// libtorch identifies an external stream by its handle, so no CUDA header is needed to name one.
char* lycore_ext_scope_open(int device, void* stream, void** out) {
  *out = nullptr;
  return told([&] {
    auto scope = std::make_unique<Scope>();
    if (device >= 0) scope->exact_convolutions.emplace();
    if (device >= 0 && stream != nullptr) {
      c10::Device where(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
      c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
      // cudaStreamLegacy, the handle 1, is libtorch's default stream, whose id is 0.
      intptr_t handle = reinterpret_cast<intptr_t>(stream);
      c10::StreamId id = handle == 1 ? 0 : static_cast<c10::StreamId>(handle);
      scope->previous = guard.exchangeStream(c10::Stream(c10::Stream::UNSAFE, where, id));
      scope->has_stream = true;
      scope->handle = stream;
    } else if (device >= 0) {
      scope->handle = current_stream(device);
    }
    *out = scope.release();
  });
}

char* lycore_ext_current_stream(int device, void** out) {
  return told([&] { *out = current_stream(device); });
}

// The cudaStream_t that libtorch's work on the scope's device goes to.
void* lycore_ext_scope_stream(void* opened) { return static_cast<Scope*>(opened)->handle; }

void lycore_ext_scope_close(void* opened) {
  Scope* scope = static_cast<Scope*>(opened);
  try {
    if (scope->has_stream) c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).exchangeStream(scope->previous);
  } catch (...) {
    // The stream belonged to the caller a moment ago; there is nobody left to tell.
  }
  delete scope;
}

}  // extern "C"
