// The one way to dynamic shared memory.
#pragma once

namespace ptx {

// The block's dynamic shared memory as a `Storage`; the launch must ask for sizeof(Storage) bytes.
template <class Storage>
__device__ __forceinline__ Storage& shared_memory() {
  extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
  return *reinterpret_cast<Storage*>(dynamic_shared_memory);
}

}  // namespace ptx
