// The extension module: the devices that operators run on, and what was built.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <atomic>

#include "bindings.h"
#include "cpu/level.h"

#ifdef FLATOPS_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace flatops {
namespace {

// Hands tasks to ATen's threads one at a time, because neither filters nor cores are equal.
void parallel(int64_t n, const std::function<void(int64_t)>& task) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), n);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i; (i = next++) < n;) task(i);
  });
}

struct Cpu {
  static constexpr at::DeviceType type = at::kCPU;
  explicit Cpu(at::Device) {}
  Parallel where = parallel;
};

TORCH_LIBRARY_IMPL(flatops, CPU, m) { implement<Cpu>(m); }

#ifdef FLATOPS_CUDA
struct Cuda {
  static constexpr at::DeviceType type = at::kCUDA;
  c10::cuda::CUDAGuard guard;
  std::vector<at::Tensor> scratch;  // the caching allocator reuses memory in the stream's order
  Gpu where;

  explicit Cuda(at::Device device)
      : guard(device), where{c10::cuda::getCurrentCUDAStream(device.index()).stream(), [this, device](int64_t bytes) {
                               scratch.push_back(at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device)));
                               return scratch.back().data_ptr();
                             }} {}
  Cuda(const Cuda&) = delete;  // `where` holds its address
};

TORCH_LIBRARY_IMPL(flatops, CUDA, m) { implement<Cuda>(m); }
#endif

void set_simd(const std::string& name) {
  for (cpu::Level l : {cpu::Level::portable, cpu::Level::avx2, cpu::Level::avx512})
    if (name == cpu::level_name(l)) {
      if (!cpu::supports(l)) throw std::invalid_argument("this machine cannot run " + name);
      return cpu::set_level(l);
    }
  throw std::invalid_argument("unknown SIMD level '" + name + "': expected portable, avx2 or avx512");
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "flatops' compiled kernels; importing this registers torch.ops.flatops.";
  m.attr("torch_version") = TORCH_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  pybind11::list archs;
#ifdef FLATOPS_CUDA
  m.attr("cuda_version") = FLATOPS_CUDA;
  for (const char* arch : {FLATOPS_CUDA_ARCHS}) archs.append(arch);
#else
  m.attr("cuda_version") = pybind11::none();
#endif
  m.attr("cuda_archs") = archs;
  m.def("insist", [](pybind11::function f) { return pybind11::cpp_function([f](const pybind11::args& args) {
                                               try {
                                                 return f(*args);
                                               } catch (pybind11::error_already_set&) {
                                                 f(*args);
                                                 throw;
                                               }
                                             }); }, "f, called once more if it raises before the error goes on. Unlike Python code it cannot be interrupted before its first line.");
  m.def("simd", [] { return cpu::level_name(cpu::level()); }, "The SIMD level in use.");
  m.def("set_simd", set_simd, "Use another SIMD level, for tests and benchmarks.");
  m.def("simd_levels", [] {
    pybind11::list names;
    for (cpu::Level l : {cpu::Level::portable, cpu::Level::avx2, cpu::Level::avx512})
      if (cpu::supports(l)) names.append(cpu::level_name(l));
    return names; }, "The SIMD levels that this machine can run.");
}

}  // namespace flatops
