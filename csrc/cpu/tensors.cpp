// Tensors of blocks from memory.h.
#include "tensors.h"

#include "memory.h"

// torch's, from 2.11 on; null in 2.10, for which torch/csrc/stable/c/shim.h is included here. Weak, as the library loads there
// too, and visible: what is hidden and weak is null everywhere.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError torch_from_blob(
    void* data, int64_t dimensions, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace rnnfast {
namespace {

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    default: return "another type";
  }
}

template <class S>
std::string shape_text(const S& sizes) {
  std::string text;
  for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
  return "(" + text + ")";
}

}  // namespace

void refuse(const char* name, const Tensor& tensor, ScalarType type, std::initializer_list<int64_t> sizes) {
  throw std::runtime_error(std::string(name) + " must be contiguous " + name_of(type) + " of shape " + shape_text(sizes) +
                           ", got " + (tensor.is_contiguous() ? "" : "strided ") + name_of(tensor.scalar_type()) +
                           " of shape " + shape_text(tensor.sizes()));
}

Tensor empty(const Tensor& like, const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t stride = 1, all = 0;
  bool fits = true;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    fits = fits && sizes[i] >= 0 && !__builtin_mul_overflow(stride, sizes[i], &stride);
  }
  check(fits && !__builtin_mul_overflow(stride, int64_t(like.element_size()), &all), "there is no tensor of shape ",
        shape_text(sizes));
  const size_t bytes = size_t(all);
  if (bytes < WORTH_KEEPING || !torch_from_blob) {
    Tensor tensor = torch::stable::new_empty(like, sizes);
    if (bytes >= LARGE_BLOCK) wish_huge_pages(tensor.mutable_data_ptr(), bytes);
    return tensor;
  }
  constexpr int32_t NO_INDEX = -1;
  int32_t dtype;
  check(aoti_torch_get_dtype(like.get(), &dtype) == AOTI_TORCH_SUCCESS, "a tensor is to be like one without a type");
  const Block block = take_block(bytes, false);
  const auto give = [](void* data, void* capacity) {
    give_back({static_cast<char*>(data), reinterpret_cast<size_t>(capacity)});
  };
  AtenTensorHandle tensor;
  const auto status = torch_from_blob(block.data, int64_t(sizes.size()), sizes.data(), strides.data(), 0, dtype,
                                      aoti_torch_device_type_cpu(), NO_INDEX, &tensor, aoti_torch_layout_strided(), nullptr,
                                      0, give, reinterpret_cast<void*>(block.capacity));
  if (status != AOTI_TORCH_SUCCESS) give_back(block);
  check(status == AOTI_TORCH_SUCCESS, "torch does not take ", bytes, " bytes for a tensor");
  return Tensor(tensor);
}

}  // namespace rnnfast
