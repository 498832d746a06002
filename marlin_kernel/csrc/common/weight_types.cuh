// The types of marlin_kernel/weight_types.py as the kernels name them. A weight is
//     scale * (value of its code - zero point).
#pragma once

#include "common/types.cuh"

enum class Zeros { NONE, INTEGER, FLOAT };  // stored zero points: none, as codes, as fp16
enum class Scales { HALF, E4M3, E8M0 };     // format of a stored scale

namespace weights {

struct uint4b8 {
  static constexpr int BITS = 4;
  static constexpr Zeros ZEROS = Zeros::NONE;
  static constexpr Scales SCALES = Scales::HALF;
};
struct uint4 {
  static constexpr int BITS = 4;
  static constexpr Zeros ZEROS = Zeros::INTEGER;
  static constexpr Scales SCALES = Scales::HALF;
};
struct uint4_hqq {
  static constexpr int BITS = 4;
  static constexpr Zeros ZEROS = Zeros::FLOAT;
  static constexpr Scales SCALES = Scales::HALF;
};
struct uint8b128 {
  static constexpr int BITS = 8;
  static constexpr Zeros ZEROS = Zeros::NONE;
  static constexpr Scales SCALES = Scales::HALF;
};
struct uint8 {
  static constexpr int BITS = 8;
  static constexpr Zeros ZEROS = Zeros::INTEGER;
  static constexpr Scales SCALES = Scales::HALF;
};
struct float8_e4m3fn {
  static constexpr int BITS = 8;
  static constexpr Zeros ZEROS = Zeros::NONE;
  static constexpr Scales SCALES = Scales::HALF;
};
struct nvfp4 {
  static constexpr int BITS = 4;
  static constexpr Zeros ZEROS = Zeros::NONE;
  static constexpr Scales SCALES = Scales::E4M3;
};
struct mxfp4 {
  static constexpr int BITS = 4;
  static constexpr Zeros ZEROS = Zeros::NONE;
  static constexpr Scales SCALES = Scales::E8M0;
};

}  // namespace weights

// Bytes of the zero points and scales of 8 features (what one lane reads of a group).
template <class Weight>
constexpr int kZeroBytes = Weight::ZEROS == Zeros::NONE    ? 0
                           : Weight::ZEROS == Zeros::FLOAT ? 16
                                                           : Weight::BITS;
template <class Weight>
constexpr int kScaleBytes = Weight::SCALES == Scales::HALF ? 16 : 8;
