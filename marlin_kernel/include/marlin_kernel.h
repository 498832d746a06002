/* Low-bit matrix products from any runtime: C99 or C++, the CUDA driver API, no Python and no
 * torch.
 *
 *     out[m, n] = a[m, k] W[k, n] (+ bias[n])
 *
 * Needs what `scripts/generate_kernels.py "8.0,9.0" --compile` writes: kernel_selector.h (put its
 * folder on the include path) and the folder `cubins`. docs/embedding.md walks through it.
 *
 * Exactly one file of a program defines MARLIN_KERNEL_IMPLEMENTATION before it includes this
 * header. libcuda.so.1 is opened at run time, so a program links without a driver (on old systems
 * with -ldl).
 *
 * 1. marlin_open once per CUDA context, which must be current; 2. pack weights once, on the host
 * (marlin_pack_codes or marlin_pack_gptq, then marlin_repack) and copy them to the device;
 * 3. marlin_plan_gemm once per shape; 4. marlin_gemm for every product.
 *
 * Functions return MARLIN_OK or say what is wrong in marlin_error(). Nothing is thread-safe on one
 * marlin_runtime but marlin_gemm, which only reads it. */
#ifndef MARLIN_KERNEL_H
#define MARLIN_KERNEL_H

#include <cuda.h>
#include <stddef.h>
#include <stdint.h>

#include "kernel_selector.h" /* marlin_dtype, marlin_weight_type, and the tables */

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  MARLIN_OK = 0,
  MARLIN_INVALID,   /* an argument breaks a rule */
  MARLIN_NO_KERNEL, /* these types or this GPU are not among what was generated */
  MARLIN_DRIVER,    /* the CUDA driver is missing or refused a call */
  MARLIN_FILE       /* a cubin is missing or unreadable */
} marlin_status;

typedef struct marlin_runtime marlin_runtime;

/* A linear layer's weights. */
typedef struct {
  marlin_weight_type type;
  int k, n;       /* inputs and outputs, any positive numbers */
  int group_size; /* inputs that share a scale; -1: all of a column */
} marlin_layer;

/* Sizes of a layer's packed tensors (marlin_kernel/FORMAT.md). */
typedef struct {
  int k_padded, n_padded, groups;
  size_t weight_bytes, scale_bytes;
  size_t zero_bytes; /* 0 for types without stored zero points */
} marlin_sizes;

/* What matters about a GPU. */
typedef struct {
  int major, minor; /* compute capability */
  int multiprocessors;
  int shared_per_block;     /* bytes, with opt-in */
  int shared_per_processor; /* bytes */
} marlin_device;

/* One product. */
typedef struct {
  marlin_layer layer;
  marlin_dtype activation, output;
  int m;               /* tokens, positive */
  int reduce_half;     /* nonzero: blocks that share a tile exchange sums in float16 */
  int batch_invariant; /* nonzero: the bits of a row do not depend on m */
} marlin_problem;

/* How a product is launched. Filled by marlin_choose or marlin_plan_gemm; plain data. */
typedef struct {
  marlin_problem problem;
  int kernel; /* row of marlin_kernels */
  unsigned grid_x, grid_y, threads, cluster, shared_bytes;
  size_t counter_bytes; /* device memory that is zero before and after every launch */
  size_t partial_bytes; /* device memory with any contents */
  int k_padded, n_padded;
  int splits, in_turn, whole_tiles;
  CUfunction function; /* NULL after marlin_choose */
} marlin_plan;

/* Device pointers of one product. Launches that may run at the same time need counters and partials
 * of their own; others may share them. */
typedef struct {
  const void* a;        /* [m, k] in the activation type, rows row_stride elements apart */
  long long row_stride; /* elements */
  const void* weights;  /* from marlin_repack */
  const void* scales;   /* from marlin_repack */
  const void* bias;     /* [n] in the output type, or NULL */
  void* out;            /* [m, n] in the output type, contiguous */
  void* counters;       /* counter_bytes of the plan, or NULL if that is 0 */
  void* partials;       /* partial_bytes of the plan, 16-byte aligned, or NULL if that is 0 */
  /* Only for the types that have them, as marlin_kernel/sm80_layout.py orders them, else NULL. For
   * 8-bit activations `a` is [m, k_padded], every 16 of a row in the order of its K_ORDER. */
  const void* zeros;         /* zero points */
  const float* token_scales; /* [m], of 8-bit activations */
  const float* global_scale; /* [1] */
} marlin_operands;

/* What went wrong last in this thread. */
const char* marlin_error(void);

/* Sizes of a layer's tensors, the same on disk and on every device. */
marlin_status marlin_layer_sizes(const marlin_layer* layer, marlin_sizes* sizes);

/* Host memory, plain codes -> on-disk order (tensors B, s and z of FORMAT.md), padding included,
 * for integer types and float8_e4m3fn. codes: [k, n], one byte each; scales: float16 bits [ceil(k /
 * group_size), n]; zeros: as many bytes, or NULL for types without stored zero points; b:
 * weight_bytes; s: scale_bytes; z: zero_bytes, or NULL. */
marlin_status marlin_pack_codes(const marlin_layer* layer, const uint8_t* codes,
                                const uint16_t* scales, const uint8_t* zeros, uint32_t* b,
                                uint16_t* s, uint32_t* z);

/* The same from a GPTQ checkpoint without act-order: qweight [k * bits / 32, n] with code k at bits
 * `bits * (k mod 32 / bits)`, scales float16 bits [groups, n], true zero points as bytes. */
marlin_status marlin_pack_gptq(const marlin_layer* layer, const uint32_t* qweight,
                               const uint16_t* scales, const uint8_t* zeros, uint32_t* b,
                               uint16_t* s, uint32_t* z);

/* Host memory, on-disk order -> the order that the kernels of `device` read; z and zeros may be
 * NULL for types without stored zero points. Outputs must not overlap inputs. */
marlin_status marlin_repack(const marlin_device* device, const marlin_layer* layer,
                            const uint32_t* b, const uint16_t* s, const uint32_t* z, void* weights,
                            void* scales, void* zeros);

/* Choose a kernel and lay out its launch. Touches no GPU. */
marlin_status marlin_choose(const marlin_device* device, const marlin_problem* problem,
                            marlin_plan* plan);

/* Open the driver, look at the current context's device, and read `directory`/index.txt. */
marlin_status marlin_open(const char* directory, marlin_runtime** runtime);
void marlin_close(marlin_runtime* runtime);
const marlin_device* marlin_get_device(const marlin_runtime* runtime);

/* marlin_choose for this runtime's device, and load the kernel. */
marlin_status marlin_plan_gemm(marlin_runtime* runtime, const marlin_problem* problem,
                               marlin_plan* plan);

/* Launch on `stream`. May be captured into a CUDA graph. Weights, scales and bias must not be
 * written by work that precedes it in the stream without an event or synchronisation between: sm_90
 * kernels read weights before the preceding kernel has ended. */
marlin_status marlin_gemm(const marlin_runtime* runtime, const marlin_plan* plan,
                          const marlin_operands* operands, CUstream stream);

#ifdef __cplusplus
}
#endif

#endif /* MARLIN_KERNEL_H */

/* ---- implementation
 * ------------------------------------------------------------------------------------- */

#ifdef MARLIN_KERNEL_IMPLEMENTATION

#include <dlfcn.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__cplusplus)
#define MARLIN_THREAD_LOCAL thread_local
#else
#define MARLIN_THREAD_LOCAL _Thread_local
#endif

static MARLIN_THREAD_LOCAL char marlin_message[1024];

const char* marlin_error(void) { return marlin_message; }

static marlin_status marlin_fail(marlin_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(marlin_message, sizeof(marlin_message), format, arguments);
  va_end(arguments);
  return status;
}

static int marlin_ceil_div(long long a, long long b) { return (int)((a + b - 1) / b); }
static int marlin_min(int a, int b) { return a < b ? a : b; }
static int marlin_max(int a, int b) { return a > b ? a : b; }

/* -- sizes and packing (marlin_kernel/layout.py and FORMAT.md) -- */

enum { MARLIN_TILE_K = 16, MARLIN_TILE_N = 64, MARLIN_PAD_K = 64 };

static int marlin_group_size(const marlin_layer* layer) { /* k for one group */
  return layer->group_size < 0 || layer->group_size >= layer->k ? layer->k : layer->group_size;
}

marlin_status marlin_layer_sizes(const marlin_layer* layer, marlin_sizes* sizes) {
  if (layer->type < 0 || layer->type >= MARLIN_WEIGHT_TYPES)
    return marlin_fail(MARLIN_INVALID, "weight type %d is not in marlin_weight_infos",
                       (int)layer->type);
  if (layer->k <= 0 || layer->n <= 0)
    return marlin_fail(MARLIN_INVALID, "a layer of %d x %d has no weights", layer->k, layer->n);
  const marlin_weight_info* info = &marlin_weight_infos[layer->type];
  const int group = marlin_group_size(layer);
  const int one_group = group == layer->k;
  int known = one_group;
  for (int i = 0; i < MARLIN_MAX_GROUP_SIZES; ++i) known |= info->group_sizes[i] == group;
  if (!known)
    return marlin_fail(MARLIN_INVALID, "group_size=%d is not allowed for %s", layer->group_size,
                       info->name);
  const int multiple = one_group ? MARLIN_PAD_K : marlin_max(MARLIN_PAD_K, group);
  sizes->k_padded = marlin_ceil_div(layer->k, multiple) * multiple;
  sizes->n_padded = marlin_ceil_div(layer->n, MARLIN_TILE_N) * MARLIN_TILE_N;
  sizes->groups = one_group ? 1 : sizes->k_padded / group;
  sizes->weight_bytes = (size_t)sizes->k_padded * sizes->n_padded * info->bits / 8;
  sizes->scale_bytes = (size_t)sizes->groups * sizes->n_padded * info->scale_bytes;
  sizes->zero_bytes =
      info->integer_zeros ? (size_t)sizes->groups * sizes->n_padded * info->bits / 8 : 0;
  return MARLIN_OK;
}

/* Whether this header packs and repacks a layer. */
static marlin_status marlin_check_packable(const marlin_layer* layer, const marlin_sizes* sizes,
                                           int has_zeros) {
  const marlin_weight_info* info = &marlin_weight_infos[layer->type];
  if (!info->packable)
    return marlin_fail(MARLIN_INVALID, "%s has tensors that this header does not pack", info->name);
  if (info->integer_zeros && sizes->groups == 1 && marlin_group_size(layer) == layer->k)
    return marlin_fail(MARLIN_INVALID,
                       "%s with one group is not packed here: repeat its scales and zero points in "
                       "groups of 128",
                       info->name);
  if (has_zeros != info->integer_zeros)
    return marlin_fail(MARLIN_INVALID, "%s %s zero points", info->name,
                       info->integer_zeros ? "needs" : "takes no");
  return MARLIN_OK;
}

typedef uint32_t (*marlin_code_reader)(const void* codes, const marlin_layer* layer, int bits,
                                       int k, int n);

static uint32_t marlin_plain_code(const void* codes, const marlin_layer* layer, int bits, int k,
                                  int n) {
  (void)bits;
  return ((const uint8_t*)codes)[(size_t)k * layer->n + n];
}

static uint32_t marlin_gptq_code(const void* codes, const marlin_layer* layer, int bits, int k,
                                 int n) {
  const int factor = 32 / bits;
  return ((const uint32_t*)codes)[(size_t)(k / factor) * layer->n + n] >> (bits * (k % factor)) &
         ((1u << bits) - 1);
}

static marlin_status marlin_pack(const marlin_layer* layer, marlin_code_reader read,
                                 const void* codes, const uint16_t* scales, const uint8_t* zeros,
                                 uint32_t* b, uint16_t* s, uint32_t* z) {
  marlin_sizes sizes;
  marlin_status status = marlin_layer_sizes(layer, &sizes);
  if (status == MARLIN_OK) status = marlin_check_packable(layer, &sizes, zeros != NULL);
  if (status != MARLIN_OK) return status;
  const marlin_weight_info* info = &marlin_weight_infos[layer->type];
  const int factor = 32 / info->bits, group = marlin_group_size(layer);
  const int stored = marlin_ceil_div(layer->k, group); /* groups that have scales */
  const int tile_words = MARLIN_TILE_K * MARLIN_TILE_N / factor;
  const uint16_t* order = info->bits == 4 ? marlin_tile_order_4 : marlin_tile_order_8;
  uint32_t* word = b;
  for (int k0 = 0; k0 < sizes.k_padded; k0 += MARLIN_TILE_K)
    for (int n0 = 0; n0 < sizes.n_padded; n0 += MARLIN_TILE_N)
      for (int w = 0; w < tile_words; ++w, ++word) {
        *word = 0;
        for (int i = 0; i < factor; ++i) {
          const int place = order[w * factor + i];
          const int k = k0 + place / MARLIN_TILE_N, n = n0 + place % MARLIN_TILE_N;
          uint32_t code = (uint32_t)info->padding; /* weighs zero */
          if (k < layer->k && n < layer->n)
            code = read(codes, layer, info->bits, k, n);
          else if (zeros != NULL && n < layer->n && k / group < stored)
            code = zeros[(size_t)(k / group) * layer->n + n];
          if (code >> info->bits)
            return marlin_fail(MARLIN_INVALID, "code %u at k=%d, n=%d has more than %d bits", code,
                               k, n, info->bits);
          *word |= code << (info->bits * i);
        }
      }
  const int grouped = sizes.groups > 1;
  const uint8_t* scale_order = grouped ? marlin_scale_order_grouped : marlin_scale_order_single;
  const int run = grouped ? 64 : 32;
  for (int g = 0; g < sizes.groups; ++g)
    for (int i = 0; i < sizes.n_padded; ++i) {
      const int n = i / run * run + scale_order[i % run];
      s[(size_t)g * sizes.n_padded + i] =
          g < stored && n < layer->n ? scales[(size_t)g * layer->n + n] : 0;
    }
  if (zeros == NULL) return MARLIN_OK;
  memset(z, 0, sizes.zero_bytes);
  for (int g = 0; g < sizes.groups; ++g)
    for (int n = 0; n < sizes.n_padded; ++n) {
      const uint32_t zero =
          g < stored && n < layer->n ? zeros[(size_t)g * layer->n + n] : (uint32_t)info->padding;
      if (zero >> info->bits)
        return marlin_fail(MARLIN_INVALID, "zero point %u of group %d, n=%d has more than %d bits",
                           zero, g, n, info->bits);
      z[((size_t)g * sizes.n_padded + n) / factor] |= zero << (info->bits * (n % factor));
    }
  return MARLIN_OK;
}

marlin_status marlin_pack_codes(const marlin_layer* layer, const uint8_t* codes,
                                const uint16_t* scales, const uint8_t* zeros, uint32_t* b,
                                uint16_t* s, uint32_t* z) {
  return marlin_pack(layer, marlin_plain_code, codes, scales, zeros, b, s, z);
}

marlin_status marlin_pack_gptq(const marlin_layer* layer, const uint32_t* qweight,
                               const uint16_t* scales, const uint8_t* zeros, uint32_t* b,
                               uint16_t* s, uint32_t* z) {
  const int factor = layer->type >= 0 && layer->type < MARLIN_WEIGHT_TYPES
                         ? 32 / marlin_weight_infos[layer->type].bits
                         : 1;
  if (layer->k % factor != 0)
    return marlin_fail(MARLIN_INVALID,
                       "k=%d is not a multiple of the %d codes in a word of qweight", layer->k,
                       factor);
  return marlin_pack(layer, marlin_gptq_code, qweight, scales, zeros, b, s, z);
}

/* -- choice of a kernel -- */

/* The architecture whose code runs on a device: the newest of the same major version, and the very
 * same if it has a suffix as in sm_90a. -1 if none was generated. */
static int marlin_find_arch(const marlin_device* device) {
  int best = -1;
  for (int i = 0; i < MARLIN_ARCHS; ++i) {
    const marlin_arch* arch = &marlin_archs[i];
    if (arch->major != device->major || arch->minor > device->minor) continue;
    if (arch->exact && arch->minor != device->minor) continue;
    if (best < 0 || arch->minor > marlin_archs[best].minor) best = i;
  }
  return best;
}

static const marlin_variant* marlin_find_variant(int arch, const marlin_problem* problem,
                                                 int group_size) {
  for (int i = 0; i < MARLIN_VARIANTS; ++i) {
    const marlin_variant* v = &marlin_variants[i];
    if (v->arch == arch && v->activation == problem->activation &&
        v->weight == problem->layer.type && v->output == problem->output &&
        v->group_size == group_size && v->batch_invariant == (problem->batch_invariant != 0))
      return v;
  }
  return NULL;
}

/* sm80: sm80_configs.geometry. */
static int marlin_lay_out_sm80(const marlin_device* device, const marlin_kernel* kernel,
                               marlin_plan* plan) {
  const int m = plan->problem.m, n = plan->problem.layer.n;
  if (kernel->shared_bytes > device->shared_per_block) return 0;
  const int fitting = device->shared_per_processor / (kernel->shared_bytes + 1024);
  const int blocks =
      device->multiprocessors * marlin_max(1, marlin_min(kernel->blocks_per_processor, fitting));
  const int columns = marlin_ceil_div(n, kernel->tile_n);
  const long long tiles = (long long)marlin_ceil_div(m, kernel->tile_m) * columns;
  const int k_tiles = marlin_ceil_div(plan->k_padded, kernel->tile_k);
  const long long slot_bytes =
      (long long)kernel->tile_m * kernel->tile_n * (plan->problem.reduce_half ? 2 : 4);
  long long grid, slots, counters;
  if (plan->problem.batch_invariant) {
    plan->splits =
        marlin_max(1, marlin_min(k_tiles, marlin_min(plan->k_padded / MARLIN_SM80_MIN_K,
                                                     MARLIN_SM80_FIXED_SPLIT_BLOCKS / columns)));
    plan->in_turn = tiles >= blocks || tiles * plan->splits > 2LL * blocks;
    const long long parts = plan->in_turn ? tiles : tiles * plan->splits;
    grid = parts < blocks ? parts : blocks;
    slots = plan->in_turn ? grid : parts;
    counters = plan->in_turn ? 0 : tiles * kernel->counters_per_tile;
  } else {
    const long long shares = tiles * k_tiles * kernel->tile_k / MARLIN_SM80_MIN_K;
    grid = shares < 1 ? 1 : shares < blocks ? shares : blocks;
    if (2 * grid * grid * k_tiles > 0xffffffffLL) return 0; /* the kernel's 32-bit partition */
    slots = 2 * grid;
    counters = 2 * grid * kernel->counters_per_tile;
  }
  plan->grid_x = (unsigned)grid;
  plan->grid_y = 1;
  plan->cluster = 1;
  plan->shared_bytes = (unsigned)kernel->shared_bytes;
  plan->partial_bytes = (size_t)(slots * slot_bytes);
  plan->counter_bytes = (size_t)counters * 4;
  return 1;
}

/* Clusters of a small-batch kernel that are resident together (kernel_configs.resident_clusters).
 */
static int marlin_clusters(const marlin_device* device, const marlin_kernel* kernel, int shared) {
  const int fitting = device->shared_per_processor / (shared + 1024);
  const int resident = marlin_max(1, marlin_min(kernel->blocks_per_processor, fitting));
  int clusters = 0;
  if (kernel->split == 1) return device->multiprocessors * resident;
  for (int i = 0; i < MARLIN_SM90_DOMAINS; ++i)
    clusters += marlin_sm90_domains[i] * resident / kernel->split;
  return marlin_max(1, (int)((long long)clusters * device->multiprocessors / 132));
}

/* sm90: kernel_configs.DecodeConfig and GemmConfig. */
static int marlin_lay_out_sm90(const marlin_device* device, const marlin_kernel* kernel,
                               marlin_plan* plan) {
  const int m = plan->problem.m;
  const int k_tiles = plan->k_padded / 64, column_tiles = plan->n_padded / 64;
  const int columns = kernel->tile_n / 64;
  plan->splits = kernel->split;
  plan->grid_y = 1;
  if (kernel->family == MARLIN_FAMILY_SM90_DECODE) {
    const long long shared = kernel->shared_bytes +
                             (long long)m * (marlin_ceil_div(k_tiles, kernel->split) * 64 * 2 + 16);
    if (m > kernel->tile_m || shared > device->shared_per_block) return 0;
    plan->grid_x = (unsigned)kernel->split;
    plan->grid_y = (unsigned)marlin_min(marlin_ceil_div(column_tiles, columns),
                                        marlin_clusters(device, kernel, (int)shared));
    plan->cluster = (unsigned)kernel->split;
    plan->shared_bytes = (unsigned)shared;
    return 1;
  }
  if (kernel->shared_bytes > device->shared_per_block) return 0;
  if (kernel->split > marlin_ceil_div(k_tiles, kernel->tile_k / 64)) return 0;
  const long long tiles =
      (long long)marlin_ceil_div(column_tiles, columns) * marlin_ceil_div(m, kernel->tile_m);
  const long long slots = (long long)device->multiprocessors * kernel->blocks_per_processor;
  const long long whole = kernel->split == 1 ? tiles : kernel->tail ? tiles / slots * slots : 0;
  const long long items = whole + (tiles - whole) * kernel->split;
  if (items > INT_MAX) return 0;
  plan->whole_tiles = (int)whole;
  plan->grid_x = (unsigned)(kernel->cluster || items < slots ? items : slots);
  plan->cluster = kernel->cluster ? (unsigned)kernel->split : 1;
  plan->shared_bytes = (unsigned)kernel->shared_bytes;
  if (kernel->split > 1 && !kernel->cluster) {
    plan->partial_bytes =
        (size_t)((tiles - whole) * kernel->split) * kernel->tile_n * kernel->tile_m * 4;
    plan->counter_bytes = (size_t)(kernel->counters_per_tile * (tiles - whole)) * 4;
  }
  return 1;
}

static int marlin_lay_out(const marlin_device* device, int kernel, marlin_plan* plan) {
  const marlin_kernel* row = &marlin_kernels[kernel];
  plan->kernel = kernel;
  plan->threads = (unsigned)row->threads;
  plan->partial_bytes = plan->counter_bytes = 0;
  plan->splits = plan->in_turn = plan->whole_tiles = 0;
  return row->family == MARLIN_FAMILY_SM80 ? marlin_lay_out_sm80(device, row, plan)
                                           : marlin_lay_out_sm90(device, row, plan);
}

static double marlin_ratio(int a, int b) { return a > b ? (double)a / b : (double)b / a; }

marlin_status marlin_choose(const marlin_device* device, const marlin_problem* problem,
                            marlin_plan* plan) {
  marlin_sizes sizes;
  const marlin_layer* layer = &problem->layer;
  const marlin_status status = marlin_layer_sizes(layer, &sizes);
  if (status != MARLIN_OK) return status;
  if (problem->m <= 0) return marlin_fail(MARLIN_INVALID, "m=%d: there are no tokens", problem->m);
  const int arch = marlin_find_arch(device);
  if (arch < 0)
    return marlin_fail(MARLIN_NO_KERNEL, "no kernels were generated for compute capability %d.%d",
                       device->major, device->minor);
  const int group =
      sizes.groups == 1 && marlin_group_size(layer) == layer->k ? -1 : layer->group_size;
  const marlin_variant* variant = marlin_find_variant(arch, problem, group);
  if (variant == NULL)
    return marlin_fail(MARLIN_NO_KERNEL,
                       "no kernels were generated for %s with group_size=%d, these activations "
                       "and this output on %s",
                       marlin_weight_infos[layer->type].name, group, marlin_archs[arch].name);
  memset(plan, 0, sizeof(*plan));
  plan->problem = *problem;
  plan->k_padded = sizes.k_padded;
  plan->n_padded = sizes.n_padded;
  /* The shape of the table that is most like this one (rows of a shape are neighbours) ... */
  const marlin_choice* choices = variant->choices;
  double nearest = 0;
  int first = -1;
  for (int i = 0; i < variant->choice_count; ++i) {
    if (first >= 0 && choices[i].k == choices[first].k && choices[i].n == choices[first].n)
      continue;
    const double distance = choices[i].k == 0 ? 1
                                              : marlin_ratio(choices[i].k, sizes.k_padded) *
                                                    marlin_ratio(choices[i].n, sizes.n_padded);
    if (first < 0 || distance < nearest) {
      nearest = distance;
      first = i;
    }
  }
  /* ... and its first row that takes so many tokens and fits. */
  for (int i = first; i < variant->choice_count && choices[i].k == choices[first].k &&
                      choices[i].n == choices[first].n;
       ++i)
    if (problem->m <= choices[i].tokens &&
        marlin_lay_out(device, variant->first_kernel + choices[i].kernel, plan))
      return MARLIN_OK;
  /* Small k: any kernel of the variant that fits, but not for batch_invariant, where only k and n
   * may decide. */
  if (!problem->batch_invariant)
    for (int i = 0; i < variant->kernel_count; ++i)
      if (marlin_lay_out(device, variant->first_kernel + i, plan)) return MARLIN_OK;
  return marlin_fail(MARLIN_NO_KERNEL,
                     "no kernel fits m=%d, k=%d, n=%d and %d bytes of shared memory", problem->m,
                     layer->k, layer->n, device->shared_per_block);
}

/* -- repacking -- */

/* Position in 64 columns that the sm90 kernels read scale i of a column tile from: i = 8 g + 2 m +
 * h holds the scale of feature 16 m + 8 h + g (csrc/sm90/problem.cuh). */
static int marlin_sm90_scale_feature(int i) { return 16 * (i / 2 % 4) + 8 * (i % 2) + i / 8; }

static void marlin_repack_sm90(const marlin_layer* layer, const marlin_sizes* sizes,
                               const uint32_t* b, const uint16_t* s, uint32_t* weights,
                               uint16_t* scales) {
  const int k_tiles = sizes->k_padded / 64, column_tiles = sizes->n_padded / 64;
  const int single = sizes->groups == 1 && marlin_group_size(layer) == layer->k;
  for (int first = 0; first < column_tiles; first += 2) {
    const int width = marlin_min(2, column_tiles - first);
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile)
      for (int c = 0; c < width; ++c)
        for (int m = 0; m < 4; ++m)
          for (int lane = 0; lane < 32; ++lane)
            for (int kk = 0; kk < 4; ++kk)
              *weights++ =
                  b[(((size_t)(k_tile * 4 + kk) * column_tiles + first + c) * 32 + lane) * 4 + m];
    const int of_tile = sizes->groups > k_tiles ? sizes->groups / k_tiles : 1; /* groups */
    for (int row = 0; row < sizes->groups / of_tile * width * of_tile; ++row) {
      const int g = row / (width * of_tile) * of_tile + row % of_tile;
      const int c = row / of_tile % width;
      const uint16_t* from = s + (size_t)g * sizes->n_padded + (first + c) * 64;
      for (int i = 0; i < 64; ++i) {
        int at = i; /* several groups: stored in this very order */
        if (single) {
          const int feature = marlin_sm90_scale_feature(i);
          at = feature / 32 * 32;
          while (at / 32 * 32 + marlin_scale_order_single[at % 32] != feature) ++at;
        }
        *scales++ = from[at];
      }
    }
  }
}

/* Zero points: natural order -> the order in which lanes read them (layout.zero_order). */
static void marlin_repack_zeros(const marlin_sizes* sizes, int bits, const uint32_t* z,
                                uint32_t* zeros) {
  const uint8_t* order = bits == 4 ? marlin_zero_order_4 : marlin_zero_order_8;
  const int factor = 32 / bits;
  const size_t count = (size_t)sizes->groups * sizes->n_padded;
  memset(zeros, 0, sizes->zero_bytes);
  for (size_t i = 0; i < count; ++i) {
    const size_t from = i / 64 * 64 + order[i % 64];
    const uint32_t zero = z[from / factor] >> (bits * (from % factor)) & ((1u << bits) - 1);
    zeros[i / factor] |= zero << (bits * (i % factor));
  }
}

marlin_status marlin_repack(const marlin_device* device, const marlin_layer* layer,
                            const uint32_t* b, const uint16_t* s, const uint32_t* z, void* weights,
                            void* scales, void* zeros) {
  marlin_sizes sizes;
  marlin_status status = marlin_layer_sizes(layer, &sizes);
  if (status == MARLIN_OK) status = marlin_check_packable(layer, &sizes, z != NULL);
  if (status != MARLIN_OK) return status;
  const int arch = marlin_find_arch(device);
  if (arch < 0)
    return marlin_fail(MARLIN_NO_KERNEL, "no kernels were generated for compute capability %d.%d",
                       device->major, device->minor);
  const int group = marlin_group_size(layer) == layer->k ? -1 : layer->group_size;
  const marlin_variant* variant = NULL;
  for (int i = 0; i < MARLIN_VARIANTS && variant == NULL; ++i)
    if (marlin_variants[i].arch == arch && marlin_variants[i].weight == layer->type &&
        marlin_variants[i].group_size == group)
      variant = &marlin_variants[i];
  if (variant == NULL)
    return marlin_fail(MARLIN_NO_KERNEL,
                       "no kernels were generated for %s with group_size=%d on %s",
                       marlin_weight_infos[layer->type].name, group, marlin_archs[arch].name);
  if (marlin_kernels[variant->first_kernel].family != MARLIN_FAMILY_SM80) {
    marlin_repack_sm90(layer, &sizes, b, s, (uint32_t*)weights, (uint16_t*)scales);
    return MARLIN_OK;
  }
  memcpy(weights, b, sizes.weight_bytes); /* tiles hold whole operand fragments already */
  if (z != NULL)
    marlin_repack_zeros(&sizes, marlin_weight_infos[layer->type].bits, z, (uint32_t*)zeros);
  if (group != -1) {
    memcpy(scales, s, sizes.scale_bytes);
  } else { /* one group: natural column order */
    for (int i = 0; i < sizes.n_padded; ++i)
      ((uint16_t*)scales)[i / 32 * 32 + marlin_scale_order_single[i % 32]] = s[i];
  }
  return MARLIN_OK;
}

/* -- the driver -- */

#define MARLIN_STRING(x) #x
#define MARLIN_SYMBOL(x) \
  MARLIN_STRING(x) /* expands cuda.h's renaming, as in cuMemAlloc -> cuMemAlloc_v2 */
#define MARLIN_DRIVER_CALLS(X) \
  X(cuCtxGetDevice)            \
  X(cuDeviceGetAttribute)      \
  X(cuGetErrorString)          \
  X(cuModuleLoadData)          \
  X(cuModuleUnload) X(cuModuleGetFunction) X(cuFuncSetAttribute) X(cuLaunchKernelEx)

struct marlin_runtime {
  void* library;
#define MARLIN_POINTER(name) __typeof__(&name) call_##name;
  MARLIN_DRIVER_CALLS(MARLIN_POINTER)
#undef MARLIN_POINTER
  CUresult (*encode)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  marlin_device device;
  char* directory;
  char* index; /* text of index.txt */
  CUmodule modules[MARLIN_KERNELS];
  CUfunction functions[MARLIN_KERNELS];
};

static marlin_status marlin_driver_error(const marlin_runtime* rt, CUresult code,
                                         const char* what) {
  const char* text = NULL;
  rt->call_cuGetErrorString(code, &text);
  return marlin_fail(MARLIN_DRIVER, "%s: %s (%d)", what, text != NULL ? text : "unknown error",
                     (int)code);
}

static char* marlin_read_file(const char* directory, const char* name, const char* ending,
                              size_t* size) {
  char path[4096];
  snprintf(path, sizeof(path), "%s/%s%s", directory, name, ending);
  FILE* file = fopen(path, "rb");
  char* content = NULL;
  long length;
  if (file == NULL) return NULL;
  if (fseek(file, 0, SEEK_END) == 0 && (length = ftell(file)) >= 0 &&
      fseek(file, 0, SEEK_SET) == 0 && (content = (char*)malloc((size_t)length + 1)) != NULL) {
    if (fread(content, 1, (size_t)length, file) == (size_t)length) {
      content[length] = 0;
      *size = (size_t)length;
    } else {
      free(content);
      content = NULL;
    }
  }
  fclose(file);
  return content;
}

void marlin_close(marlin_runtime* rt) {
  if (rt == NULL) return;
  for (int i = 0; i < MARLIN_KERNELS; ++i)
    if (rt->modules[i] != NULL) rt->call_cuModuleUnload(rt->modules[i]);
  free(rt->directory);
  free(rt->index);
  if (rt->library != NULL) dlclose(rt->library);
  free(rt);
}

static marlin_status marlin_open_in(marlin_runtime* rt, const char* directory) {
  size_t size;
  CUdevice device;
  CUresult code;
  rt->library = dlopen("libcuda.so.1", RTLD_NOW);
  if (rt->library == NULL) return marlin_fail(MARLIN_DRIVER, "libcuda.so.1: %s", dlerror());
#define MARLIN_LOOK_UP(name)                                                          \
  if ((*(void**)& rt->call_##name = dlsym(rt->library, MARLIN_SYMBOL(name))) == NULL) \
    return marlin_fail(MARLIN_DRIVER, "this driver has no %s", MARLIN_SYMBOL(name));
  MARLIN_DRIVER_CALLS(MARLIN_LOOK_UP)
#undef MARLIN_LOOK_UP
  *(void**)&rt->encode = dlsym(rt->library, "cuTensorMapEncodeTiled"); /* needed on sm_90 only */
  if ((code = rt->call_cuCtxGetDevice(&device)) != CUDA_SUCCESS)
    return marlin_driver_error(rt, code, "cuCtxGetDevice (is a context current?)");
  const struct {
    CUdevice_attribute attribute;
    int* value;
  } facts[] = {
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &rt->device.major},
      {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &rt->device.minor},
      {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &rt->device.multiprocessors},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &rt->device.shared_per_block},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, &rt->device.shared_per_processor},
  };
  for (size_t i = 0; i < sizeof(facts) / sizeof(facts[0]); ++i)
    if ((code = rt->call_cuDeviceGetAttribute(facts[i].value, facts[i].attribute, device)) !=
        CUDA_SUCCESS)
      return marlin_driver_error(rt, code, "cuDeviceGetAttribute");
  rt->directory = (char*)malloc(strlen(directory) + 1);
  if (rt->directory == NULL) return marlin_fail(MARLIN_FILE, "out of memory");
  strcpy(rt->directory, directory);
  rt->index = marlin_read_file(directory, "index", ".txt", &size);
  if (rt->index == NULL)
    return marlin_fail(MARLIN_FILE,
                       "%s/index.txt cannot be read; generate_kernels.py --compile writes it",
                       directory);
  return MARLIN_OK;
}

marlin_status marlin_open(const char* directory, marlin_runtime** runtime) {
  marlin_runtime* rt = (marlin_runtime*)calloc(1, sizeof(marlin_runtime));
  if (rt == NULL) return marlin_fail(MARLIN_FILE, "out of memory");
  const marlin_status status = marlin_open_in(rt, directory);
  if (status != MARLIN_OK) {
    marlin_close(rt);
    rt = NULL;
  }
  *runtime = rt;
  return status;
}

const marlin_device* marlin_get_device(const marlin_runtime* runtime) { return &runtime->device; }

static marlin_status marlin_load(marlin_runtime* rt, int kernel) {
  const char* key = marlin_kernels[kernel].key;
  char file[64], symbol[1024];
  size_t size;
  CUresult code;
  const char* line = strstr(rt->index, key);
  if (line == NULL || sscanf(line + strlen(key), " %63s %1023s", file, symbol) != 2)
    return marlin_fail(MARLIN_FILE,
                       "%s/index.txt lists no kernel %s; compile again after generating",
                       rt->directory, key);
  char* image = marlin_read_file(rt->directory, file, ".cubin", &size);
  if (image == NULL)
    return marlin_fail(MARLIN_FILE, "%s/%s.cubin cannot be read", rt->directory, file);
  code = rt->call_cuModuleLoadData(&rt->modules[kernel], image);
  free(image);
  if (code != CUDA_SUCCESS) return marlin_driver_error(rt, code, "cuModuleLoadData");
  code = rt->call_cuModuleGetFunction(&rt->functions[kernel], rt->modules[kernel], symbol);
  if (code == CUDA_SUCCESS)
    code = rt->call_cuFuncSetAttribute(rt->functions[kernel],
                                       CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                       rt->device.shared_per_block);
  if (code == CUDA_SUCCESS && marlin_kernels[kernel].family != MARLIN_FAMILY_SM80)
    code = rt->call_cuFuncSetAttribute(rt->functions[kernel],
                                       CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100);
  if (code != CUDA_SUCCESS) {
    rt->functions[kernel] = NULL;
    return marlin_driver_error(rt, code, "cuModuleGetFunction, cuFuncSetAttribute");
  }
  return MARLIN_OK;
}

marlin_status marlin_plan_gemm(marlin_runtime* rt, const marlin_problem* problem,
                               marlin_plan* plan) {
  marlin_status status = marlin_choose(&rt->device, problem, plan);
  if (status != MARLIN_OK) return status;
  if (rt->functions[plan->kernel] == NULL) status = marlin_load(rt, plan->kernel);
  plan->function = rt->functions[plan->kernel];
  return status;
}

/* Kernel arguments: csrc/sm80/tile_config.cuh and csrc/sm90/problem.cuh (a test compares them). */
typedef struct {
  const void *activations, *weights, *scales, *zeros, *permutation, *token_scales, *global_scale;
  const void* bias;
  void *output, *partials, *arrivals;
  long long row_stride;
  int m, n, k, n_padded, k_padded, splits, in_turn;
} marlin_sm80_problem;

typedef struct {
  const void *activations, *weights, *scales, *bias;
  void* out;
  long long row_stride;
  int m, n, k, column_tiles, k_tiles, split, whole_tiles;
  void *partials, *counters;
  const void* global_scale;
} marlin_sm90_problem;

/* launch._tensor_map: boxes of `tokens` rows x 64 k with the 128-byte swizzle. */
static marlin_status marlin_tensor_map(const marlin_runtime* rt, const marlin_plan* plan,
                                       const marlin_operands* x, CUtensorMap* map) {
  const marlin_problem* p = &plan->problem;
  const cuuint64_t sizes[2] = {(cuuint64_t)p->layer.k, (cuuint64_t)p->m};
  const cuuint64_t strides[1] = {(cuuint64_t)x->row_stride * 2};
  const cuuint32_t box[2] = {64, (cuuint32_t)marlin_kernels[plan->kernel].tile_m},
                   steps[2] = {1, 1};
  if (rt->encode == NULL)
    return marlin_fail(MARLIN_DRIVER, "this driver has no cuTensorMapEncodeTiled");
  if ((uintptr_t)x->a % 16 != 0 || x->row_stride % 8 != 0)
    return marlin_fail(MARLIN_INVALID,
                       "rows of a must start on 16 bytes: address %p, row_stride=%lld", x->a,
                       x->row_stride);
  const CUresult code =
      rt->encode(map,
                 p->activation == MARLIN_FLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                 2, (void*)(uintptr_t)x->a, sizes, strides, box, steps,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? MARLIN_OK : marlin_driver_error(rt, code, "cuTensorMapEncodeTiled");
}

marlin_status marlin_gemm(const marlin_runtime* rt, const marlin_plan* plan,
                          const marlin_operands* x, CUstream stream) {
  const marlin_problem* p = &plan->problem;
  const int family = marlin_kernels[plan->kernel].family;
  const int eight_bit = p->activation == MARLIN_INT8 || p->activation == MARLIN_FLOAT8_E4M3FN;
  marlin_sm80_problem sm80;
  marlin_sm90_problem sm90;
  CUtensorMap map;
  CUlaunchAttribute attributes[2];
  CUlaunchConfig config;
  void* arguments[2];
  if (plan->function == NULL)
    return marlin_fail(MARLIN_INVALID, "the plan is not from marlin_plan_gemm");
  if (x->a == NULL || x->weights == NULL || x->scales == NULL || x->out == NULL ||
      x->row_stride < p->layer.k)
    return marlin_fail(MARLIN_INVALID,
                       "a, weights, scales and out must be set, and row_stride=%lld at least k=%d",
                       x->row_stride, p->layer.k);
  if (eight_bit != (x->token_scales != NULL))
    return marlin_fail(MARLIN_INVALID, "token_scales come with 8-bit activations, and only then");
  if (marlin_weight_infos[p->layer.type].symmetric != (x->zeros == NULL))
    return marlin_fail(MARLIN_INVALID, "zeros come with %s only if it stores zero points",
                       marlin_weight_infos[p->layer.type].name);
  if ((plan->counter_bytes > 0 && x->counters == NULL) ||
      (plan->partial_bytes > 0 && x->partials == NULL))
    return marlin_fail(MARLIN_INVALID, "this plan needs %zu bytes of counters and %zu of partials",
                       plan->counter_bytes, plan->partial_bytes);
  memset(attributes, 0, sizeof(attributes));
  memset(&config, 0, sizeof(config));
  config.gridDimX = plan->grid_x;
  config.gridDimY = plan->grid_y;
  config.gridDimZ = 1;
  config.blockDimX = plan->threads;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = plan->shared_bytes;
  config.hStream = stream;
  config.attrs = attributes;
  if (family == MARLIN_FAMILY_SM80) {
    sm80.activations = x->a;
    sm80.weights = x->weights;
    sm80.scales = x->scales;
    sm80.zeros = x->zeros;
    sm80.permutation = NULL;
    sm80.token_scales = x->token_scales;
    sm80.global_scale = x->global_scale;
    sm80.bias = x->bias;
    sm80.output = x->out;
    sm80.partials = x->partials;
    sm80.arrivals = x->counters;
    sm80.row_stride = x->row_stride;
    sm80.m = p->m;
    sm80.n = p->layer.n;
    sm80.k = eight_bit ? plan->k_padded : p->layer.k;
    sm80.n_padded = plan->n_padded;
    sm80.k_padded = plan->k_padded;
    sm80.splits = plan->splits;
    sm80.in_turn = plan->in_turn;
    arguments[0] = &sm80;
  } else {
    sm90.activations = x->a;
    sm90.weights = x->weights;
    sm90.scales = x->scales;
    sm90.bias = x->bias;
    sm90.out = x->out;
    sm90.row_stride = x->row_stride;
    sm90.m = p->m;
    sm90.n = p->layer.n;
    sm90.k = p->layer.k;
    sm90.column_tiles = plan->n_padded / 64;
    sm90.k_tiles = plan->k_padded / 64;
    sm90.split = plan->splits;
    sm90.whole_tiles = plan->whole_tiles;
    sm90.partials = x->partials;
    sm90.counters = x->counters;
    sm90.global_scale = NULL;
    arguments[0] = &sm90;
    /* Programmatic dependent launch: these kernels wait for their predecessors by themselves. */
    attributes[0].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attributes[0].value.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
    if (plan->cluster > 1) {
      attributes[1].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
      attributes[1].value.clusterDim.x = plan->cluster;
      attributes[1].value.clusterDim.y = attributes[1].value.clusterDim.z = 1;
      config.numAttrs = 2;
    }
    if (family == MARLIN_FAMILY_SM90_GEMM) {
      const marlin_status status = marlin_tensor_map(rt, plan, x, &map);
      if (status != MARLIN_OK) return status;
      arguments[1] = &map;
    }
  }
  const CUresult code = rt->call_cuLaunchKernelEx(&config, plan->function, arguments, NULL);
  return code == CUDA_SUCCESS ? MARLIN_OK : marlin_driver_error(rt, code, "cuLaunchKernelEx");
}

#ifdef __cplusplus
}
#endif

#endif /* MARLIN_KERNEL_IMPLEMENTATION */
