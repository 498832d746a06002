// Runs the quantizer's kernels under the emulator. Compiled with -DCASES="SEARCH(0, 32, 64) ...":
// the number of each kernel and its template arguments.
#include "../../gptq/csrc/dots.cuh"
#include "../../gptq/csrc/search.cuh"
#include "../../gptq/csrc/update.cuh"

extern "C" __attribute__((visibility("default"))) const char* violation() {
  return emu::S.violation.c_str();
}

#define VISIBLE extern "C" __attribute__((visibility("default")))

// Of the update kernel.
template <int BLOCK, bool SWEEP, bool PRUNE, int GRID>
constexpr int storage_bytes() {
  return sizeof(gptq::UpdateStorage<BLOCK, GRID>);
}

// sizeof of the storage that a kernel asks for.
VISIBLE int shared_bytes(int kernel) {
  switch (kernel) {
#define SEARCH(number, ...) \
  case number:              \
    return sizeof(gptq::SearchStorage<__VA_ARGS__>);
#define UPDATE(number, ...) \
  case number:              \
    return storage_bytes<__VA_ARGS__>();
#define PICK(number, threads) \
  case number:                \
    return 0;
#define DOTS(number, threads) \
  case number:                \
    return 0;
    CASES
#undef SEARCH
#undef UPDATE
#undef PICK
#undef DOTS
  }
  return -1;
}

VISIBLE int run(int kernel, unsigned seed, int grid_x, int grid_y, const void* arguments) {
  const dim3 grid = {unsigned(grid_x), unsigned(grid_y), 1};
  switch (kernel) {
#define SEARCH(number, ...)                                                                 \
  case number: {                                                                            \
    const auto p = *static_cast<const gptq::SearchProblem*>(arguments);                     \
    return emu::launch(grid, {gptq::kSearchThreads}, sizeof(gptq::SearchStorage<__VA_ARGS__>), \
                       1, seed, [=] { gptq::search_kernel<__VA_ARGS__>(p); });              \
  }
#define UPDATE(number, ...)                                                                    \
  case number: {                                                                               \
    const auto p = *static_cast<const gptq::UpdateProblem*>(arguments);                        \
    return emu::launch(grid, {gptq::kUpdateThreads}, storage_bytes<__VA_ARGS__>(), 1, seed,    \
                       [=] { gptq::update_kernel<__VA_ARGS__>(p); });                          \
  }
#define PICK(number, threads)                                         \
  case number: {                                                      \
    const auto p = *static_cast<const gptq::PickProblem*>(arguments); \
    return emu::launch(grid, {threads}, 0, 1, seed,                   \
                       [=] { gptq::pick_kernel<threads>(p); });       \
  }
#define DOTS(number, threads)                                         \
  case number: {                                                      \
    const auto p = *static_cast<const gptq::DotsProblem*>(arguments); \
    return emu::launch(grid, {threads}, 0, 1, seed,                   \
                       [=] { gptq::dots_kernel<threads>(p); });       \
  }
    CASES
#undef SEARCH
#undef UPDATE
#undef PICK
#undef DOTS
  }
  return -1;
}
