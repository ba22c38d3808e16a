// What rnnfast/direct asks before each call, and the calls, as functions of Python's: they tell in a fraction of the time that
// bytecode takes whether anything is not as it was. What has to be as it was is for rnnfast/direct/plans.py to say.
#include "python.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "direct.h"
#include "memory.h"

namespace rnnfast {
namespace {

// A reference that is ours, or null after an error.
class Ref {
 public:
  explicit Ref(PyObject* object) : object_(object) {}
  Ref(const Ref&) = delete;
  Ref& operator=(const Ref&) = delete;
  ~Ref() {
    if (object_) Py_DecRef(object_);
  }
  operator PyObject*() const { return object_; }
  PyObject* get() const { return object_; }
  static PyObject* another(PyObject* object) { return Py_IncRef(object), object; }
  PyObject* release() { return std::exchange(object_, nullptr); }

 private:
  PyObject* object_;
};

PyObject* none() { return Ref::another(&_Py_NoneStruct); }

// What cannot be asked is not as it was: its error is dropped. One that is no Exception, such as an interrupt, stays.
bool is_interrupted() {
  if (PyErr_Occurred() && PyErr_ExceptionMatches(PyExc_Exception)) PyErr_Clear();
  return PyErr_Occurred();
}

PyObject* none_after_error() { return is_interrupted() ? nullptr : none(); }

PyObject* yes_or_no(bool answer) { return is_interrupted() ? nullptr : PyBool_FromLong(answer); }

PyObject* type_error(const char* message) {
  PyErr_SetString(PyExc_TypeError, message);
  return nullptr;
}

PyObject* attribute(PyObject* object, PyObject* name) { return object ? PyObject_GetAttr(object, name) : nullptr; }

bool equals(PyObject* a, PyObject* b) { return a && b && PyObject_RichCompareBool(a, b, Py_EQ) == 1; }

// A number that an attribute or a method without arguments has; false after an error.
bool take_number(PyObject* object, int64_t& number) {
  const Ref held(object);
  number = held ? PyLong_AsLongLong(held) : -1;
  return held && !(number == -1 && PyErr_Occurred());
}

#define RNNFAST_NAME(name)                                                \
  PyObject* name_of_##name() {                                            \
    static PyObject* const interned = PyUnicode_InternFromString(#name); \
    return interned;                                                      \
  }
RNNFAST_NAME(_version)
RNNFAST_NAME(contiguous)
RNNFAST_NAME(data_ptr)
RNNFAST_NAME(dtype)
RNNFAST_NAME(fused_steps)
RNNFAST_NAME(is_cpu)
RNNFAST_NAME(is_neg)
RNNFAST_NAME(itemsize)
RNNFAST_NAME(numel)
RNNFAST_NAME(shape)
#undef RNNFAST_NAME

PyObject* method(PyObject* object, PyObject* name) { return PyObject_CallMethodObjArgs(object, name, nullptr); }

bool address_of(PyObject* tensor, int64_t& address) { return take_number(method(tensor, name_of_data_ptr()), address); }

// ---- conditions -----------------------------------------------------------------------------------------------------

// As rnnfast/direct/plans.py numbers them; what follows in a condition's tuple:
enum Kind : long {
  RETURNS,    // function, arguments, value: what the function returns equals it
  HAS,        // name, value: the module's attribute equals it
  HAS_ITEMS,  // name, keys, values, size: the module's attribute has these very objects, and so many items
  IS_EMPTY,   // name: the module's attribute is false
};

bool holds(PyObject* condition, PyObject* module) {
  const auto part = [&](int index) { return PyTuple_GetItem(condition, index); };
  switch (PyLong_AsLongLong(part(0))) {
    case RETURNS: return equals(Ref(PyObject_CallObject(part(1), part(2))), part(3));
    case HAS: return equals(Ref(attribute(module, part(1))), part(2));
    case HAS_ITEMS: {
      const Ref items(attribute(module, part(1)));
      PyObject *const keys = part(2), *const values = part(3);
      if (!items || PyObject_Size(items) != PyLong_AsLongLong(part(4))) return false;
      for (ptrdiff_t i = 0, n = PyTuple_Size(keys); i < n; ++i)
        if (Ref(PyObject_GetItem(items, PyTuple_GetItem(keys, i))) != PyTuple_GetItem(values, i)) return false;
      return true;
    }
    case IS_EMPTY: {
      const Ref items(attribute(module, part(1)));
      return items && PyObject_IsTrue(items) == 0;
    }
    default: return false;
  }
}

// False after an error, too.
bool all_hold(PyObject* conditions, PyObject* module) {
  for (ptrdiff_t i = 0, n = PyTuple_Size(conditions); i < n; ++i)
    if (!holds(PyTuple_GetItem(conditions, i), module)) return false;
  return true;
}

// self: a tuple of conditions. holds(module) -> bool
PyObject* holds_function(PyObject* conditions, PyObject* module) { return yes_or_no(all_hold(conditions, module)); }

// What tells whether weights were written to: the number of steps of fused optimizers, which the first of these has, and the
// versions and addresses of all. Calls see(number) for each while it returns true; false after an error, too.
template <class F>
bool each_of_stamp(PyObject* fused, PyObject* weights, F see) {
  int64_t number;
  if (!take_number(attribute(fused, name_of_fused_steps()), number) || !see(number)) return false;
  for (ptrdiff_t i = 0, n = PyTuple_Size(weights); i < n; ++i) {
    PyObject* const weight = PyTuple_GetItem(weights, i);
    if (!take_number(attribute(weight, name_of__version()), number) || !see(number)) return false;
    if (!address_of(weight, number) || !see(number)) return false;
  }
  return true;
}

// self: (what has the number of fused steps, weights). stamp() -> bytes
PyObject* stamp_function(PyObject* self, PyObject*) {
  std::vector<int64_t> numbers;
  const auto add = [&](int64_t number) { return numbers.push_back(number), true; };
  if (!each_of_stamp(PyTuple_GetItem(self, 0), PyTuple_GetItem(self, 1), add)) return nullptr;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(numbers.data()), ptrdiff_t(numbers.size() * sizeof(int64_t)));
}

// ---- tensors --------------------------------------------------------------------------------------------------------

bool is_plain(PyObject* tensor, PyObject* tensor_type, PyObject* dtype) {
  if (Ref(PyObject_Type(tensor)) != tensor_type) return false;
  int64_t address;
  const auto is = [](PyObject* answer, bool yes) { return answer && PyObject_IsTrue(answer) == int(yes); };
  return Ref(attribute(tensor, name_of_dtype())) == dtype && is(Ref(attribute(tensor, name_of_is_cpu())), true) &&
         is(Ref(method(tensor, name_of_is_neg())), false) && address_of(tensor, address) && address;
}

// self: torch.Tensor. is_plain(tensor, dtype) -> bool
PyObject* is_plain_function(PyObject* self, PyObject* const* given, ptrdiff_t count) {
  return yes_or_no(count == 2 && is_plain(given[0], self, given[1]));
}

// self: (a function of sizes, strides and a dtype, for small tensors; one of a tensor and sizes, for large ones).
// empty(like, *sizes) -> a tensor of the dtype of `like`
PyObject* empty_function(PyObject* self, PyObject* const* given, ptrdiff_t count) {
  if (count < 1) return type_error("empty takes a tensor and sizes");
  const ptrdiff_t dims = count - 1;
  const Ref sizes(PyTuple_New(dims)), strides(PyTuple_New(dims)), dtype(attribute(given[0], name_of_dtype()));
  int64_t bytes, stride = 1, size;
  if (!sizes || !strides || !dtype || !take_number(attribute(dtype, name_of_itemsize()), bytes)) return nullptr;
  for (ptrdiff_t i = dims; i-- > 0;) {
    PyTuple_SetItem(sizes, i, Ref::another(given[1 + i]));
    PyTuple_SetItem(strides, i, PyLong_FromLongLong(stride));
    size = PyLong_AsLongLong(given[1 + i]);
    // What is too large is refused there.
    if (__builtin_mul_overflow(stride, std::max<int64_t>(size, 1), &stride)) stride = INT64_MAX / bytes;
  }
  if (PyErr_Occurred()) return nullptr;
  const bool small = stride < int64_t(WORTH_KEEPING) / bytes;
  return small ? PyObject_CallFunctionObjArgs(PyTuple_GetItem(self, 0), sizes.get(), strides.get(), dtype.get(), nullptr)
               : PyObject_CallFunctionObjArgs(PyTuple_GetItem(self, 1), given[0], sizes.get(), nullptr);
}

// ---- calls ----------------------------------------------------------------------------------------------------------

template <class F>
auto without_lock(F run) {
  void* const thread = PyEval_SaveThread();
  const auto result = run();
  PyEval_RestoreThread(thread);
  return result;
}

// A number, or the address of a tensor, or 0 for None; false after an error.
bool take_field(PyObject* given, int64_t& number) {
  number = 0;
  if (given == &_Py_NoneStruct) return true;
  if (Ref(PyObject_Type(given)) != &PyLong_Type) {
    int64_t count = 0;
    if (!address_of(given, number) || (!number && !take_number(method(given, name_of_numel()), count))) return false;
    if (count > 0) PyErr_SetString(PyExc_RuntimeError, "a tensor of the call has no memory: its storage has been freed");
    return count == 0;
  }
  number = PyLong_AsLongLong(given);
  return !(number == -1 && PyErr_Occurred());
}

// One of the functions of direct.h, given the fields of its structure one by one -> int
template <class Fields, int64_t (*RUN)(const Fields&)>
PyObject* call_function(PyObject*, PyObject* const* given, ptrdiff_t count) {
  int64_t numbers[sizeof(Fields) / sizeof(int64_t)];
  if (count != ptrdiff_t(std::size(numbers))) return type_error("a direct call has another number of fields");
  for (ptrdiff_t i = 0; i < count; ++i)
    if (!take_field(given[i], numbers[i])) return nullptr;
  Fields fields;
  std::memcpy(&fields, numbers, sizeof fields);
  return PyLong_FromLongLong(without_lock([&] { return RUN(fields); }));
}

// What does not change from step to step.
enum StepPart { CONDITIONS, LAYER, FUSED, WEIGHTS, STAMP, TENSOR, DTYPE, SHAPE, EMPTY, OUTPUT, PACKED, BATCH, PLACES };

// self: those. step(input) -> output or None. A place is (state, address of h, address of c or 0). The places are a list: of the
// state now, of the next one, and of the one after it.
PyObject* step_function(PyObject* self, PyObject* input) {
  const auto part = [&](StepPart index) { return PyTuple_GetItem(self, index); };
  if (!all_hold(part(CONDITIONS), part(LAYER))) return none_after_error();
  const char* stamp = PyBytes_AsString(part(STAMP));
  const auto is_next = [&](int64_t number) {
    const bool same = !std::memcmp(stamp, &number, sizeof number);
    stamp += sizeof number;
    return same;
  };
  if (!each_of_stamp(part(FUSED), part(WEIGHTS), is_next)) return none_after_error();
  if (!is_plain(input, part(TENSOR), part(DTYPE))) return none_after_error();
  if (!equals(Ref(attribute(input, name_of_shape())), part(SHAPE))) return none_after_error();
  const Ref rows(method(input, name_of_contiguous()));
  Ref output(PyObject_CallObject(part(EMPTY), part(OUTPUT)));
  const auto number = [](PyObject* tuple, int index) { return PyLong_AsLongLong(PyTuple_GetItem(tuple, index)); };
  const auto pointer = [&](PyObject* tuple, int index) { return reinterpret_cast<void*>(number(tuple, index)); };
  PyObject* const places = part(PLACES);
  // Ours: another thread may take a step meanwhile.
  const Ref now(Ref::another(PyList_GetItem(places, 0))), next(Ref::another(PyList_GetItem(places, 1)));
  int64_t from, to;
  if (!rows || !output || !address_of(rows, from) || !address_of(output, to)) return none_after_error();
  const DirectInfer call{pointer(self, PACKED),
                         1,
                         number(self, BATCH),
                         reinterpret_cast<const void*>(from),
                         pointer(now, 1),
                         pointer(now, 2),
                         reinterpret_cast<void*>(to),
                         pointer(next, 1),
                         pointer(next, 2)};
  if (without_lock([&] { return direct_infer(call); }) != DIRECT_DONE) return none();
  PyList_SetItem(places, 0, Ref::another(next));
  PyList_SetItem(places, 1, Ref::another(PyList_GetItem(places, 2)));
  PyList_SetItem(places, 2, Ref::another(next));
  return output.release();
}

template <class F>
PyMethodDef defined(const char* name, F function, int flags) {
  const auto any = reinterpret_cast<void (*)()>(function);  // Python knows by the flags what it takes
  return {name, reinterpret_cast<PyCFunction>(any), flags, nullptr};
}

}  // namespace
}  // namespace rnnfast

// The built-in function of that name with that `self`.
extern "C" __attribute__((visibility("default"))) PyObject* rnnfast_function(const char* name, PyObject* self) {
  using namespace rnnfast;
  static PyMethodDef functions[] = {
      defined("holds", holds_function, METH_O),
      defined("stamp", stamp_function, METH_NOARGS),
      defined("is_plain", is_plain_function, METH_FASTCALL),
      defined("empty", empty_function, METH_FASTCALL),
      defined("infer", call_function<DirectInfer, direct_infer>, METH_FASTCALL),
      defined("forward", call_function<DirectForward, direct_forward>, METH_FASTCALL),
      defined("backward", call_function<DirectBackward, direct_backward>, METH_FASTCALL),
      defined("pack_backward", call_function<DirectPack, direct_pack_backward>, METH_FASTCALL),
      defined("weight_gradients", call_function<DirectWeights, direct_weight_gradients>, METH_FASTCALL),
      defined("step", step_function, METH_O),
  };
  for (PyMethodDef& each : functions)
    if (!std::strcmp(each.name, name)) return PyCFunction_NewEx(&each, self, nullptr);
  return type_error("there is no function of this name");
}
