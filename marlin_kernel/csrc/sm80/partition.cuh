// Who computes what: the sequence of (output tile, k range) units of one block.
//
// Stream-K (splits == 0). Tiles that fill whole waves of the grid belong to one block each; the
// rest, between one and two tiles per block (all of them if there are fewer than two), is cut into
// equal runs of k tiles, wherever that falls. Three blocks over two tiles of three k tiles:
//
//       tile 0   tile 1     Block 1 finishes tile 0 and begins tile 1, so both tiles have two
//   k0    0        1        contributions. A block contributes to at most two unfinished tiles:
//   k1    0        2        the one its run begins in and the one it ends in. Each has a slot in
//   k2    1        2        the workspace: slot 2b for the first, slot 2b + 1 for the second.
//
// Fixed split (splits > 0). Every tile is cut at the same places whatever M is, so a row of the
// result has the same bits in every batch. Either the parts of a tile go to different blocks, or
// (in_turn, for many tiles) one block takes all parts of its tile one after the other and adds them
// up in the same order.
#pragma once

#include "sm80/tile_config.cuh"

namespace sm80 {

// Token tiles that are neighbours in the order of tiles: blocks that run together then share both
// activations and weights in L2.
constexpr int RASTER_TOKEN_TILES = 8;

struct Unit {
  int token_tile, column_tile;
  int k_begin, k_end;   // k tiles
  int part, parts;      // this contribution, and how many the tile has
  bool in_turn;         // all parts come one after the other in this block
  int first_block;      // stream-K: the block with part 0
  int counter;          // index of the tile's arrival counters
  unsigned tile_begin;  // stream-K: the tile's first iteration in the shared run
};

class Partition {
 public:
  __device__ Partition(int token_tiles, int column_tiles, int k_tiles, int splits, bool in_turn,
                       int grid)
      : token_tiles_(token_tiles),
        column_tiles_(column_tiles),
        k_tiles_(k_tiles),
        splits_(splits),
        in_turn_(in_turn),
        tiles_(token_tiles * column_tiles) {
    const long long iterations = static_cast<long long>(tiles_) * k_tiles;
    blocks_ = iterations < grid ? static_cast<int>(iterations) : grid;
    const int waves = tiles_ / blocks_;
    whole_waves_ = tiles_ % blocks_ == 0 ? waves : waves > 0 ? waves - 1 : 0;
    shared_iterations_ = static_cast<unsigned>(tiles_ - whole_waves_ * blocks_) * k_tiles;
  }

  // The unit number `index` (0, 1, ...) of `block`; false after its last one.
  __device__ bool unit(int block, int index, Unit& u) const {
    if (splits_ > 0) return split_unit(block, index, u);
    if (block >= blocks_) return false;
    if (index < whole_waves_) {
      locate(index * blocks_ + block, u);
      u.k_begin = 0;
      u.k_end = k_tiles_;
      u.part = 0;
      u.parts = 1;
      u.in_turn = false;
      return true;
    }
    const unsigned run_begin = begin_of(block);
    const unsigned run_end = begin_of(block + 1);
    const unsigned tile = run_begin / k_tiles_ + (index - whole_waves_);
    u.tile_begin = tile * k_tiles_;
    if (u.tile_begin >= run_end) return false;
    locate(whole_waves_ * blocks_ + static_cast<int>(tile), u);
    const unsigned tile_end = u.tile_begin + k_tiles_;
    u.k_begin = run_begin > u.tile_begin ? static_cast<int>(run_begin - u.tile_begin) : 0;
    u.k_end = run_end < tile_end ? static_cast<int>(run_end - u.tile_begin) : k_tiles_;
    u.first_block = block_of(u.tile_begin);
    u.part = block - u.first_block;
    u.parts = block_of(tile_end - 1) - u.first_block + 1;
    u.in_turn = false;
    u.counter = static_cast<int>(tile);
    return true;
  }

  // Workspace slot of contribution `part` to the tile of `u`.
  __device__ int slot(const Unit& u, int part, int block) const {
    if (u.in_turn) return block;
    if (splits_ > 0) return u.counter * splits_ + part;
    const int owner = u.first_block + part;
    return 2 * owner + (begin_of(owner) < u.tile_begin ? 1 : 0);
  }

 private:
  // Block b's run of the shared iterations is [begin_of(b), begin_of(b + 1)). 32 bits suffice:
  // there are fewer than two tiles per block, so the products stay below 2 * blocks^2 * k_tiles
  // (the host checks it).
  __device__ unsigned begin_of(unsigned block) const {
    return block * shared_iterations_ / blocks_;
  }
  // The largest b with begin_of(b) <= iteration.
  __device__ int block_of(unsigned iteration) const {
    return static_cast<int>(((iteration + 1) * blocks_ - 1) / shared_iterations_);
  }

  __device__ bool split_unit(int block, int index, Unit& u) const {
    int tile;
    u.in_turn = in_turn_;
    if (in_turn_) {
      tile = block + index / splits_ * blocks_;
      u.part = index % splits_;
    } else {
      const int number = block + index * blocks_;
      tile = number / splits_;
      u.part = number % splits_;
    }
    if (block >= blocks_ || tile >= tiles_) return false;
    locate(tile, u);
    u.k_begin = u.part * k_tiles_ / splits_;
    u.k_end = (u.part + 1) * k_tiles_ / splits_;
    u.parts = splits_;
    u.counter = tile;
    return true;
  }

  // Tiles are numbered in bands of RASTER_TOKEN_TILES token tiles, column after column inside a
  // band.
  __device__ void locate(int tile, Unit& u) const {
    const int band_tiles = RASTER_TOKEN_TILES * column_tiles_;
    const int band = tile / band_tiles;
    const int first = band * RASTER_TOKEN_TILES;
    const int height =
        token_tiles_ - first < RASTER_TOKEN_TILES ? token_tiles_ - first : RASTER_TOKEN_TILES;
    const int inside = tile - band * band_tiles;
    u.token_tile = first + inside % height;
    u.column_tile = inside / height;
  }

  int token_tiles_, column_tiles_, k_tiles_, splits_;
  bool in_turn_;
  int tiles_;
  int blocks_;                  // blocks that have work
  int whole_waves_;             // tiles that every block computes alone
  unsigned shared_iterations_;  // k tiles of all the other tiles
};

}  // namespace sm80
