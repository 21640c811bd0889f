// The only file that knows Python: unpacks arguments, releases the GIL, translates errors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "core/error.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "cuda/cuda.h"

namespace py = pybind11;

namespace pygpt {
namespace {

void bind_machine(py::module_& m) {
  m.def("isa", &current_isa);
  m.def("available_isas", &available_isas);
  m.def("set_torch_threads", [](uintptr_t parallel_for, uintptr_t get_num_threads) {
    set_torch_threads(reinterpret_cast<TorchParallelFor>(parallel_for),
                      reinterpret_cast<TorchGetNumThreads>(get_num_threads));
  });
  m.def("num_threads", &num_threads);
  m.def("cuda_info", [] {
    const CudaInfo info = cuda_info();
    py::dict d;
    d["built"] = info.built;
    d["runtime_version"] = info.runtime_version;
    d["driver_version"] = info.driver_version;
    d["devices"] = info.devices;
    d["why_unusable"] = info.why_unusable;
    return d;
  });
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const KeyError& e) {
    py::set_error(PyExc_KeyError, e.what());
  } catch (const UserError& e) {
    py::set_error(py::module_::import("pygpt.errors").attr("PygptError"), e.what());
  }
}

}  // namespace
}  // namespace pygpt

PYBIND11_MODULE(_native, m) {
  using namespace pygpt;
  py::register_local_exception_translator(&translate);
  current_isa();  // an unknown PYGPT_ISA is an error here, not at the first call
  bind_machine(m);
}
