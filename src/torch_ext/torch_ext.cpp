// The little C++ that tch does not bind. Plain C functions; no exception leaves them: a failure is a text, freed by the caller.

#include <ATen/Context.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>

namespace {

char* text_of(const char* what) {
  char* copy = new (std::nothrow) char[std::strlen(what) + 1];
  if (copy != nullptr) std::strcpy(copy, what);
  return copy;
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

}  // namespace

extern "C" {

// An address inside libtorch's CPU half.
void* lycore_ext_libtorch_address() { return reinterpret_cast<void*>(&at::globalContext); }

void lycore_ext_free_text(char* text) { delete[] text; }

// Opens a scope in which fp32 products are exact (no TF32) and autocast is off. device is a CUDA device or -1 for the CPU; unless stream is NULL,
// work goes to this cudaStream_t.
// libtorch identifies an external stream by its handle, so no CUDA header is needed to name one.
char* lycore_ext_scope_open(int device, void* stream, void** out) {
  *out = nullptr;
  try {
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
      c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
      scope->handle = guard.getStream(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device))).native_handle();
    }
    *out = scope.release();
    return nullptr;
  } catch (const std::exception& e) {
    return text_of(e.what());
  } catch (...) {
    return text_of("unknown C++ exception");
  }
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
