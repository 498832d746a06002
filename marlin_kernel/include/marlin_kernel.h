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
 * 3. marlin_plan_gemm once per shape; 4. marlin_gemm for every product, with 8-bit activations
 * after marlin_quantize.
 *
 * Functions return MARLIN_OK or say what is wrong in marlin_error(). Nothing is thread-safe on one
 * marlin_runtime but marlin_gemm and marlin_quantize, which only read it. */
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

/* Sizes of the same in the order of a GPU's kernels. */
typedef struct {
  size_t weight_bytes, scale_bytes;
  size_t zero_bytes; /* 0 also where zero points lie beside the scales or the codes */
} marlin_repacked_sizes;

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
  int reduce_half;     /* nonzero: blocks that share a tile may exchange sums in float16 */
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
  CUfunction function;  /* NULL after marlin_choose */
  CUfunction quantizer; /* of 8-bit activations, else NULL */
} marlin_plan;

/* Device pointers of one product. Launches that may run at the same time need counters and partials
 * of their own; others may share them. */
typedef struct {
  const void* a;             /* [m, k], rows row_stride elements apart; or codes of marlin_quantize */
  long long row_stride;      /* elements; k_padded of the plan for codes */
  const void* weights;       /* from marlin_repack, as are scales and zeros */
  const void* scales;
  const void* zeros;         /* NULL where marlin_repacked_sizes has no zero_bytes */
  const float* token_scales; /* [m], from marlin_quantize, or NULL for 16-bit activations */
  const float* global_scale; /* [1], of the types that have one (nvfp4), else NULL */
  const void* bias;          /* [n] in the output type, or NULL */
  void* out;                 /* [m, n] in the output type, contiguous */
  void* counters;            /* counter_bytes of the plan, or NULL if that is 0 */
  void* partials;            /* partial_bytes of the plan, 16-byte aligned, or NULL if that is 0 */
} marlin_operands;

/* What went wrong last in this thread. */
const char* marlin_error(void);

/* Sizes of a layer's tensors in on-disk order. */
marlin_status marlin_layer_sizes(const marlin_layer* layer, marlin_sizes* sizes);

/* Host memory, plain codes -> on-disk order (tensors B, s and z of FORMAT.md), padding included.
 * codes: [k, n], one byte each; scales: [ceil(k / group_size), n] in the type's format (float16
 * bits, or bytes of e4m3 for nvfp4 and e8m0 for mxfp4); zeros: as many zero points, a byte each
 * (uint4_hqq: float16 bits), or NULL for types without stored zero points; b: weight_bytes; s:
 * scale_bytes; z: zero_bytes, or NULL. */
marlin_status marlin_pack_codes(const marlin_layer* layer, const uint8_t* codes, const void* scales,
                                const void* zeros, uint32_t* b, void* s, void* z);

/* The same from a GPTQ checkpoint without act-order: qweight [k * bits / 32, n] with code k at bits
 * `bits * (k mod 32 / bits)`, scales float16 bits [groups, n], true zero points as bytes. */
marlin_status marlin_pack_gptq(const marlin_layer* layer, const uint32_t* qweight,
                               const uint16_t* scales, const uint8_t* zeros, uint32_t* b,
                               uint16_t* s, uint32_t* z);

/* Sizes of a layer in the order that the kernels of `device` read with activations of a type. */
marlin_status marlin_repack_sizes(const marlin_device* device, const marlin_layer* layer,
                                  marlin_dtype activation, marlin_repacked_sizes* sizes);

/* Host memory, on-disk order -> the order that the kernels of `device` read with activations of a
 * type (docs/embedding.md says which there are; each has a drawing in csrc). Outputs have the sizes
 * of marlin_repack_sizes, begin on 16 bytes, and must not overlap inputs; z and zeros may be NULL
 * where there are none. */
marlin_status marlin_repack(const marlin_device* device, const marlin_layer* layer,
                            marlin_dtype activation, const uint32_t* b, const void* s,
                            const void* z, void* weights, void* scales, void* zeros);

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

/* Round activations to the 8 bits that a plan multiplies, with one scale per token. a: [m, k] in the
 * plan's output type, rows row_stride elements apart; codes: m * k_padded bytes, on 16 bytes;
 * token_scales: [m]; all in device memory. */
marlin_status marlin_quantize(const marlin_runtime* runtime, const marlin_plan* plan, const void* a,
                              long long row_stride, void* codes, float* token_scales,
                              CUstream stream);

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

static int marlin_one_group(const marlin_layer* layer) {
  return layer->group_size < 0 || layer->group_size >= layer->k;
}

static int marlin_group_size(const marlin_layer* layer) { /* k for one group */
  return marlin_one_group(layer) ? layer->k : layer->group_size;
}

marlin_status marlin_layer_sizes(const marlin_layer* layer, marlin_sizes* sizes) {
  if (layer->type < 0 || layer->type >= MARLIN_WEIGHT_TYPES)
    return marlin_fail(MARLIN_INVALID, "weight type %d is not in marlin_weight_infos",
                       (int)layer->type);
  if (layer->k <= 0 || layer->n <= 0)
    return marlin_fail(MARLIN_INVALID, "a layer of %d x %d has no weights", layer->k, layer->n);
  const marlin_weight_info* info = &marlin_weight_infos[layer->type];
  int known = 0, whole = 0; /* columns may be groups */
  for (int i = 0; i < MARLIN_MAX_GROUP_SIZES && info->group_sizes[i] != 0; ++i) {
    known |= info->group_sizes[i] == layer->group_size;
    whole |= info->group_sizes[i] < 0;
  }
  if (!known && !(whole && layer->group_size == layer->k))
    return marlin_fail(MARLIN_INVALID, "group_size=%d is not allowed for %s", layer->group_size,
                       info->name);
  const int group = marlin_group_size(layer), one_group = marlin_one_group(layer);
  const int multiple = one_group ? MARLIN_PAD_K : marlin_max(MARLIN_PAD_K, group);
  sizes->k_padded = marlin_ceil_div(layer->k, multiple) * multiple;
  sizes->n_padded = marlin_ceil_div(layer->n, MARLIN_TILE_N) * MARLIN_TILE_N;
  sizes->groups = one_group ? 1 : sizes->k_padded / group;
  const size_t columns = (size_t)sizes->groups * sizes->n_padded;
  sizes->weight_bytes = (size_t)sizes->k_padded * sizes->n_padded * info->bits / 8;
  sizes->scale_bytes = columns * info->scale_bytes;
  sizes->zero_bytes = columns * info->zero_bits / 8;
  return MARLIN_OK;
}

static marlin_status marlin_check_zeros(const marlin_layer* layer, int given) {
  const marlin_weight_info* info = &marlin_weight_infos[layer->type];
  return given == (info->zero_bits > 0)
             ? MARLIN_OK
             : marlin_fail(MARLIN_INVALID, "%s %s zero points", info->name,
                           info->zero_bits > 0 ? "needs" : "takes no");
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

/* [stored groups, n] numbers of `width` bytes -> [groups, n_padded], in the order of columns of
 * scales, zeros where there are none. */
static void marlin_pack_columns(const marlin_layer* layer, const marlin_sizes* sizes, int width,
                                int stored, const void* from, void* to) {
  const uint8_t* order = sizes->groups > 1 ? marlin_scale_order_grouped : marlin_scale_order_single;
  const int run = sizes->groups > 1 ? 64 : 32;
  memset(to, 0, (size_t)sizes->groups * sizes->n_padded * width);
  for (int g = 0; g < stored; ++g)
    for (int i = 0; i < sizes->n_padded; ++i) {
      const int n = i / run * run + order[i % run];
      if (n < layer->n)
        memcpy((char*)to + ((size_t)g * sizes->n_padded + i) * width,
               (const char*)from + ((size_t)g * layer->n + n) * width, width);
    }
}

static marlin_status marlin_pack(const marlin_layer* layer, marlin_code_reader read,
                                 const void* codes, const void* scales, const void* zeros,
                                 uint32_t* b, void* s, void* z) {
  marlin_sizes sizes;
  marlin_status status = marlin_layer_sizes(layer, &sizes);
  if (status == MARLIN_OK) status = marlin_check_zeros(layer, zeros != NULL);
  if (status != MARLIN_OK) return status;
  const marlin_weight_info* info = &marlin_weight_infos[layer->type];
  const int factor = 32 / info->bits, group = marlin_group_size(layer);
  const int one_group = marlin_one_group(layer);
  const int stored = marlin_ceil_div(layer->k, group); /* groups that have scales */
  const int tile_words = MARLIN_TILE_K * MARLIN_TILE_N / factor;
  const uint16_t* order = info->bits == 4 ? marlin_tile_order_4 : marlin_tile_order_8;
  const uint8_t* codes_of_zeros = info->zero_bits == info->bits ? (const uint8_t*)zeros : NULL;
  uint32_t* word = b;
  for (int k0 = 0; k0 < sizes.k_padded; k0 += MARLIN_TILE_K)
    for (int n0 = 0; n0 < sizes.n_padded; n0 += MARLIN_TILE_N)
      for (int w = 0; w < tile_words; ++w, ++word) {
        *word = 0;
        for (int i = 0; i < factor; ++i) {
          const int place = order[w * factor + i];
          const int k = k0 + place / MARLIN_TILE_N, n = n0 + place % MARLIN_TILE_N;
          const int g = one_group ? 0 : k / group;
          uint32_t code = (uint32_t)info->padding; /* weighs zero */
          if (k < layer->k && n < layer->n)
            code = read(codes, layer, info->bits, k, n);
          else if (codes_of_zeros != NULL && n < layer->n && g < stored)
            code = codes_of_zeros[(size_t)g * layer->n + n];
          if (code >> info->bits)
            return marlin_fail(MARLIN_INVALID, "code %u at k=%d, n=%d has more than %d bits", code,
                               k, n, info->bits);
          *word |= code << (info->bits * i);
        }
      }
  marlin_pack_columns(layer, &sizes, info->scale_bytes, stored, scales, s);
  if (info->zero_bits == 16) marlin_pack_columns(layer, &sizes, 2, stored, zeros, z);
  if (codes_of_zeros == NULL) return MARLIN_OK;
  memset(z, 0, sizes.zero_bytes);
  for (int g = 0; g < sizes.groups; ++g)
    for (int n = 0; n < sizes.n_padded; ++n) {
      const uint32_t zero = g < stored && n < layer->n ? codes_of_zeros[(size_t)g * layer->n + n]
                                                       : (uint32_t)info->padding;
      if (zero >> info->bits)
        return marlin_fail(MARLIN_INVALID, "zero point %u of group %d, n=%d has more than %d bits",
                           zero, g, n, info->bits);
      ((uint32_t*)z)[((size_t)g * sizes.n_padded + n) / factor] |=
          zero << (info->bits * (n % factor));
    }
  return MARLIN_OK;
}

marlin_status marlin_pack_codes(const marlin_layer* layer, const uint8_t* codes, const void* scales,
                                const void* zeros, uint32_t* b, void* s, void* z) {
  return marlin_pack(layer, marlin_plain_code, codes, scales, zeros, b, s, z);
}

marlin_status marlin_pack_gptq(const marlin_layer* layer, const uint32_t* qweight,
                               const uint16_t* scales, const uint8_t* zeros, uint32_t* b,
                               uint16_t* s, uint32_t* z) {
  const int known = layer->type >= 0 && layer->type < MARLIN_WEIGHT_TYPES;
  const int factor = known ? 32 / marlin_weight_infos[layer->type].bits : 1;
  if (known && !marlin_weight_infos[layer->type].integer)
    return marlin_fail(MARLIN_INVALID, "%s is not a type of GPTQ checkpoints; use marlin_pack_codes",
                       marlin_weight_infos[layer->type].name);
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

/* Group size of the kernels that serve a layer; -1: one scale per feature. A single group that these
 * kernels do not know is repeated (sm80_layout.kernel_tensors). */
static int marlin_kernel_group_size(const marlin_layer* layer, int family) {
  if (!marlin_one_group(layer)) return layer->group_size;
  const int repeated = marlin_weight_infos[layer->type].repeated_group;
  return family == MARLIN_FAMILY_SM90_8BIT || repeated == 0 ? -1 : repeated;
}

static const marlin_kernel* marlin_first_kernel(const marlin_variant* variant) {
  return &marlin_kernels[variant->first_kernel];
}

/* The variant that serves a layer and activations; problem: of which output, reduction and
 * batch_invariant, or NULL for any. */
static const marlin_variant* marlin_find_variant(int arch, const marlin_layer* layer,
                                                 marlin_dtype activation,
                                                 const marlin_problem* problem) {
  const marlin_variant* found = NULL;
  for (int i = 0; i < MARLIN_VARIANTS; ++i) {
    const marlin_variant* v = &marlin_variants[i];
    if (v->arch != arch || v->activation != activation || v->weight != layer->type ||
        v->group_size != marlin_kernel_group_size(layer, marlin_first_kernel(v)->family))
      continue;
    if (problem == NULL) return v;
    if (v->output != problem->output || v->batch_invariant != (problem->batch_invariant != 0))
      continue;
    if (v->reduce_half == (problem->reduce_half != 0)) return v;
    if (!v->reduce_half) found = v; /* float32 serves as well */
  }
  return found;
}

static marlin_status marlin_no_variant(int arch, const marlin_layer* layer) {
  return marlin_fail(MARLIN_NO_KERNEL,
                     "no kernels were generated for %s with group_size=%d, these activations and "
                     "this output on %s",
                     marlin_weight_infos[layer->type].name, layer->group_size,
                     marlin_archs[arch].name);
}

static marlin_status marlin_no_arch(const marlin_device* device) {
  return marlin_fail(MARLIN_NO_KERNEL, "no kernels were generated for compute capability %d.%d",
                     device->major, device->minor);
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
  if (kernel->family == MARLIN_FAMILY_SM90_DECODE) {
    const long long shared = kernel->shared_bytes +
                             (long long)m * (marlin_ceil_div(k_tiles, kernel->split) * 64 * 2 + 16);
    if (m > kernel->tile_m || shared > device->shared_per_block) return 0;
    plan->grid_x = (unsigned)kernel->split;
    plan->grid_y = (unsigned)marlin_min(marlin_ceil_div(column_tiles, columns),
                                        marlin_clusters(device, kernel, (int)shared));
    plan->shared_bytes = (unsigned)shared;
    return 1;
  }
  if (kernel->shared_bytes > device->shared_per_block) return 0;
  if (kernel->split > marlin_ceil_div(k_tiles, kernel->tile_k / 64)) return 0;
  const long long tiles =
      (long long)marlin_ceil_div(column_tiles, columns) * marlin_ceil_div(m, kernel->tile_m);
  const long long slots = (long long)device->multiprocessors * kernel->blocks_per_processor;
  const long long whole = kernel->split == 1 ? tiles : kernel->tail ? tiles / slots * slots : 0;
  const long long last = tiles - whole; /* tiles that are split */
  /* A split of 0 gives every block an equal stretch of the stages of these tiles. */
  const long long each =
      kernel->split > 0 ? kernel->split : marlin_ceil_div(k_tiles, kernel->tile_k / 64);
  const long long items = whole + last * each;
  if (items > INT_MAX) return 0;
  if (kernel->split == 0) plan->splits = last > 0 ? (int)((slots + last - 1) / last) + 1 : 1;
  plan->whole_tiles = (int)whole;
  plan->grid_x = (unsigned)(kernel->cluster > 1 || items < slots ? items : slots);
  plan->shared_bytes = (unsigned)kernel->shared_bytes;
  if (kernel->split != 1 && kernel->cluster == 1) {
    plan->partial_bytes = (size_t)(last * plan->splits) * kernel->tile_n * kernel->tile_m * 4;
    plan->counter_bytes = (size_t)(kernel->counters_per_tile * last) * 4;
  }
  return 1;
}

/* sm90_8bit: sm90_8bit_configs.EightBitConfig. */
static int marlin_lay_out_sm90_8bit(const marlin_device* device, const marlin_kernel* kernel,
                                    marlin_plan* plan) {
  const int multicast = kernel->cluster / kernel->split; /* blocks that share tokens */
  if (kernel->shared_bytes > device->shared_per_block) return 0;
  if (kernel->split > marlin_ceil_div(plan->k_padded, kernel->tile_k)) return 0;
  const long long tiles =
      (long long)marlin_ceil_div(plan->problem.layer.n, kernel->tile_n * multicast) *
      marlin_ceil_div(plan->problem.m, kernel->tile_m);
  const long long room = device->multiprocessors * kernel->blocks_per_processor / multicast;
  const long long clusters = kernel->split > 1 || tiles < room ? tiles : room;
  if (clusters > INT_MAX / kernel->cluster) return 0;
  plan->grid_x = (unsigned)(clusters * kernel->cluster);
  plan->shared_bytes = (unsigned)kernel->shared_bytes;
  return 1;
}

static int marlin_lay_out(const marlin_device* device, int kernel, marlin_plan* plan) {
  const marlin_kernel* row = &marlin_kernels[kernel];
  plan->kernel = kernel;
  plan->threads = (unsigned)row->threads;
  plan->cluster = (unsigned)row->cluster;
  plan->grid_y = 1;
  plan->partial_bytes = plan->counter_bytes = 0;
  plan->splits = plan->in_turn = plan->whole_tiles = 0;
  if (row->family == MARLIN_FAMILY_SM80) return marlin_lay_out_sm80(device, row, plan);
  if (row->family == MARLIN_FAMILY_SM90_8BIT) return marlin_lay_out_sm90_8bit(device, row, plan);
  return marlin_lay_out_sm90(device, row, plan);
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
  if (arch < 0) return marlin_no_arch(device);
  const marlin_variant* variant = marlin_find_variant(arch, layer, problem->activation, problem);
  if (variant == NULL) return marlin_no_variant(arch, layer);
  memset(plan, 0, sizeof(*plan));
  plan->problem = *problem;
  plan->problem.reduce_half = variant->reduce_half;
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
   * may decide (all kernels of an sm90_8bit variant add up alike). */
  if (!problem->batch_invariant ||
      marlin_first_kernel(variant)->family == MARLIN_FAMILY_SM90_8BIT)
    for (int i = 0; i < variant->kernel_count; ++i)
      if (marlin_lay_out(device, variant->first_kernel + i, plan)) return MARLIN_OK;
  return marlin_fail(MARLIN_NO_KERNEL,
                     "no kernel fits m=%d, k=%d, n=%d and %d bytes of shared memory", problem->m,
                     layer->k, layer->n, device->shared_per_block);
}

/* -- repacking -- */

/* A layer's tensors in on-disk order, and where columns lie in them. */
typedef struct {
  const marlin_layer* layer;
  const marlin_weight_info* info;
  marlin_sizes sizes;
  const uint32_t* b;
  const void *s, *z;
  uint8_t column[64];   /* position of a column's scale in 64 columns */
  uint16_t place[1024]; /* position of code row * 64 + column in a tile, in codes */
} marlin_stored;

static void marlin_index_stored(marlin_stored* x) {
  const int run = x->sizes.groups > 1 ? 64 : 32;
  const uint8_t* columns = run == 64 ? marlin_scale_order_grouped : marlin_scale_order_single;
  const uint16_t* places = x->info->bits == 4 ? marlin_tile_order_4 : marlin_tile_order_8;
  for (int i = 0; i < 64; ++i) x->column[i / run * run + columns[i % run]] = (uint8_t)i;
  for (int i = 0; i < 1024; ++i) x->place[places[i]] = (uint16_t)i;
}

/* The stored group of row `group` of the kernels' scales: a single one may be repeated. */
static int marlin_stored_group(const marlin_stored* x, int group) {
  return x->sizes.groups == 1 ? 0 : group;
}

/* Number of `width` bytes of a group and column n: a scale, or a zero point in float16. */
static const char* marlin_number(const marlin_stored* x, const void* numbers, int width, int group,
                                 int n) {
  const size_t row = (size_t)marlin_stored_group(x, group) * x->sizes.n_padded;
  return (const char*)numbers + (row + n / 64 * 64 + x->column[n % 64]) * width;
}

static uint32_t marlin_bits(const uint32_t* words, int bits, size_t index) {
  const int factor = 32 / bits;
  return words[index / factor] >> (bits * (index % factor)) & ((1u << bits) - 1);
}

static uint32_t marlin_zero(const marlin_stored* x, int group, int n) {
  return marlin_bits((const uint32_t*)x->z, x->info->bits,
                     (size_t)marlin_stored_group(x, group) * x->sizes.n_padded + n);
}

static uint32_t marlin_code(const marlin_stored* x, int k, int n) {
  const size_t tile = (size_t)(k / 16) * (x->sizes.n_padded / 64) + n / 64;
  return marlin_bits(x->b, x->info->bits, tile * 1024 + x->place[k % 16 * 64 + n % 64]);
}

/* Rows of scales and zero points of the sm80 and sm90 kernels, of groups of `group` inputs. */
static int marlin_rows(const marlin_sizes* sizes, int group) {
  return group < 0 ? 1 : marlin_ceil_div(sizes->k_padded, group);
}

/* Scales of 64 columns in the order in which lanes read them; returns their end. */
static char* marlin_write_scales(const marlin_stored* x, int group, int n, char* to) {
  const int width = x->info->scale_bytes;
  for (int i = 0; i < 64; ++i, to += width)
    memcpy(to, marlin_number(x, x->s, width, group, n + marlin_scale_order_grouped[i]), width);
  return to;
}

/* Zero points of 64 columns likewise. */
static char* marlin_write_zeros(const marlin_stored* x, int group, int n, char* to) {
  const int bits = x->info->bits;
  if (x->info->zero_bits == 16) {
    for (int i = 0; i < 64; ++i, to += 2)
      memcpy(to, marlin_number(x, x->z, 2, group, n + marlin_scale_order_grouped[i]), 2);
  } else if (x->info->zero_bits > 0) {
    const uint8_t* order = bits == 4 ? marlin_zero_order_4 : marlin_zero_order_8;
    for (int i = 0; i < 64; i += 32 / bits, to += 4) {
      uint32_t word = 0;
      for (int j = 0; j < 32 / bits; ++j)
        word |= marlin_zero(x, group, n + order[i + j]) << (bits * j);
      memcpy(to, &word, 4);
    }
  }
  return to;
}

/* sm80_layout.py: tiles hold whole operand fragments already. */
static void marlin_repack_sm80(const marlin_stored* x, int group, void* weights, char* scales,
                               char* zeros) {
  const int width = x->info->scale_bytes, rows = marlin_rows(&x->sizes, group);
  memcpy(weights, x->b, x->sizes.weight_bytes);
  for (int g = 0; g < rows; ++g)
    for (int n = 0; n < x->sizes.n_padded; n += 64) {
      if (group > 0) {
        scales = marlin_write_scales(x, g, n, scales);
      } else { /* one scale per feature: in natural order */
        for (int i = 0; i < 64; ++i, scales += width)
          memcpy(scales, marlin_number(x, x->s, width, g, n + i), width);
      }
      zeros = marlin_write_zeros(x, g, n, zeros);
    }
}

/* sm90_layout.arrange_floats: codes of float4_e2m1f, sign and magnitude apart. */
static uint32_t marlin_arrange_floats(uint32_t word) {
  uint32_t arranged = 0;
  for (int i = 0; i < 8; ++i) {
    arranged |= (word >> (4 * i) & 7) << (4 * marlin_float4_nibbles[i]);
    arranged |= (word >> (4 * i + 3) & 1) << marlin_float4_signs[i];
  }
  return arranged;
}

/* sm90_layout.py and csrc/sm90/problem.cuh: pairs of columns of 64 x 64 tiles. */
static void marlin_repack_sm90(const marlin_stored* x, int group, uint32_t* weights, char* rows) {
  const int k_tiles = x->sizes.k_padded / 64, columns = x->sizes.n_padded / 64;
  const int halves = x->info->bits / 4; /* words of a lane for 16 x 16 codes */
  const int of_tile = group > 0 && group < 64 ? 64 / group : 1; /* groups */
  const int units = marlin_rows(&x->sizes, group) / of_tile;
  for (int first = 0; first < columns; first += 2) {
    const int width = marlin_min(2, columns - first);
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile)
      for (int c = 0; c < width; ++c)
        for (int m = 0; m < 4; ++m)
          for (int i = 0; i < 128 * halves; ++i) {
            /* 4 bits: lane, kk; 8 bits: kk / 2, lane, kk % 2, h */
            const int lane = halves == 1 ? i / 4 : i / 4 % 32;
            const int kk = halves == 1 ? i % 4 : i / 128 * 2 + i / 2 % 2;
            const int h = halves == 1 ? 0 : i % 2;
            const size_t tile = (size_t)(k_tile * 4 + kk) * columns + first + c;
            const uint32_t word = x->b[((tile * 32 + lane) * 4 + m) * halves + h];
            *weights++ = x->info->float4 ? marlin_arrange_floats(word) : word;
          }
    for (int unit = 0; unit < units; ++unit)
      for (int c = 0; c < width; ++c)
        for (int row = 0; row < of_tile; ++row) {
          const int g = unit * of_tile + row, n = (first + c) * 64;
          rows = marlin_write_scales(x, g, n, rows);
          rows = marlin_write_zeros(x, g, n, rows);
        }
  }
}

/* A record of the sm90_8bit kernels: 64 features x 128 inputs (sm90_8bit_configs.EightBitTypes). */
enum { MARLIN_RECORD_K = 128 };
static int marlin_record_rows(const marlin_weight_info* info, int group) {
  return group > 0 ? MARLIN_RECORD_K / group : info->zero_bits > 0;
}
static int marlin_record_bytes(const marlin_weight_info* info, int group) {
  const int row = (group > 0 ? 64 * 2 : 0) + (info->zero_bits > 0 ? 64 : 0);
  return 64 * MARLIN_RECORD_K * info->bits / 8 + marlin_record_rows(info, group) * row;
}

static float marlin_from_half(const char* from) {
  uint16_t half;
  memcpy(&half, from, 2);
  const int exponent = half >> 10 & 31;
  const uint32_t sign = (uint32_t)(half & 0x8000) << 16, mantissa = half & 0x3ff;
  uint32_t bits = sign | (uint32_t)(exponent + 112) << 23 | mantissa << 13;
  float value;
  if (exponent == 31) bits = sign | 0x7f800000 | mantissa << 13;
  if (exponent == 0) { /* a multiple of 2^-24 */
    value = (float)mantissa / 16777216.f;
    return sign != 0 ? -value : value;
  }
  memcpy(&value, &bits, 4);
  return value;
}

/* Codes of a record of the column of tiles `column`, from input k0 on
 * (csrc/dequant/eight_bit_fragment.cuh). */
static void marlin_write_codes_8bit(const marlin_stored* x, marlin_dtype activation, int column,
                                    int k0, uint8_t* to) {
  for (int i = 0; i < 64 * MARLIN_RECORD_K; ++i) { /* codes by input and feature */
    const int k = i / 64, m = i / 16 % 4, h = i / 8 % 2, g = i % 8;
    int position = 0; /* of k among the 16 of the instruction's order */
    while (marlin_k_order[position] != k % 16) ++position;
    const int t = position / 4, byte = position % 4;
    uint32_t code = 0;
    if (k0 + k < x->sizes.k_padded) code = marlin_code(x, k0 + k, column * 64 + i % 64);
    if (x->info->bits == 8) {
      const int at = (((((k / 32 * 4 + m) * 8 + g) * 4 + t) * 2 + k / 16 % 2) * 2 + h) * 4 + byte;
      to[at] = (uint8_t)(x->info->padding == 128 ? code ^ 128 : code);
      continue;
    }
    uint8_t* word = to + ((((k / 64 * 4 + m) * 8 + g) * 4 + t) * 4 + k / 16 % 4) * 4;
    if (activation == MARLIN_FLOAT8_E4M3FN) { /* sign and magnitude of code - 8 */
      const uint32_t negative = code < 8;
      word[byte] |= (uint8_t)((negative ? 7 - code : code - 8) << (4 * h));
      word[h == 0 ? byte : (byte + 1) % 4] |= (uint8_t)(negative << (h == 0 ? 7 : 3));
    } else {
      const uint32_t flip = x->info->zero_bits == 0 ? 8 : 0; /* code - 8 in two's complement */
      word[byte] |= (uint8_t)((code ^ flip) << (4 * h));
    }
  }
}

/* sm90_8bit_layout.py. unit: EightBitTypes.unit. */
static void marlin_repack_sm90_8bit(const marlin_stored* x, marlin_dtype activation, int group,
                                    float unit, uint8_t* records, float* scales) {
  const marlin_weight_info* info = x->info;
  const int stages = marlin_ceil_div(x->sizes.k_padded, MARLIN_RECORD_K);
  const int columns = x->sizes.n_padded / 64, rows = marlin_record_rows(info, group);
  memset(records, 0, (size_t)columns * stages * marlin_record_bytes(info, group));
  for (int column = 0; column < columns; ++column)
    for (int stage = 0; stage < stages; ++stage) {
      marlin_write_codes_8bit(x, activation, column, stage * MARLIN_RECORD_K, records);
      records += 64 * MARLIN_RECORD_K * info->bits / 8;
      for (int row = 0; row < rows; ++row) {
        const int g = group > 0 ? stage * rows + row : 0, stored = g < x->sizes.groups;
        const int zeros = group > 0 ? 128 : 0; /* their place, after the scales */
        for (int i = 0; i < 64 && stored; ++i) { /* feature 16 m + 8 h + g at [m][g][h] */
          const int n = column * 64 + i / 16 * 16 + i % 2 * 8 + i / 2 % 8;
          if (group > 0) memcpy(records + 2 * i, marlin_number(x, x->s, 2, g, n), 2);
          if (info->zero_bits > 0) records[zeros + i] = (uint8_t)(128 - marlin_zero(x, g, n));
        }
        records += zeros + (info->zero_bits > 0 ? 64 : 0);
      }
    }
  if (group > 0) scales[0] = unit;
  for (int n = 0; group < 0 && n < x->sizes.n_padded; ++n)
    scales[n] = marlin_from_half(marlin_number(x, x->s, 2, 0, n)) * unit;
}

/* The kernels that a layer is repacked for: a variant, or NULL and why not. */
static const marlin_variant* marlin_repack_target(const marlin_device* device,
                                                  const marlin_layer* layer,
                                                  marlin_dtype activation, marlin_sizes* sizes,
                                                  marlin_status* status) {
  *status = marlin_layer_sizes(layer, sizes);
  if (*status != MARLIN_OK) return NULL;
  const int arch = marlin_find_arch(device);
  const marlin_variant* variant = NULL;
  if (arch < 0) {
    *status = marlin_no_arch(device);
  } else if ((variant = marlin_find_variant(arch, layer, activation, NULL)) == NULL) {
    *status = marlin_no_variant(arch, layer);
  } else if (marlin_first_kernel(variant)->family == MARLIN_FAMILY_SM90_8BIT &&
             activation == MARLIN_INT8 && variant->group_size < 0 && layer->k > MARLIN_LARGEST_K) {
    *status = marlin_fail(MARLIN_INVALID,
                          "k=%d with one scale per feature: sums of int8 products are exact in 32 "
                          "bits up to %d; use groups of 128",
                          layer->k, MARLIN_LARGEST_K);
    variant = NULL;
  }
  return variant;
}

marlin_status marlin_repack_sizes(const marlin_device* device, const marlin_layer* layer,
                                  marlin_dtype activation, marlin_repacked_sizes* repacked) {
  marlin_sizes sizes;
  marlin_status status;
  const marlin_variant* variant = marlin_repack_target(device, layer, activation, &sizes, &status);
  if (variant == NULL) return status;
  const marlin_weight_info* info = &marlin_weight_infos[layer->type];
  const int family = marlin_first_kernel(variant)->family, group = variant->group_size;
  const size_t columns = (size_t)marlin_rows(&sizes, group) * sizes.n_padded;
  repacked->weight_bytes = sizes.weight_bytes;
  repacked->scale_bytes = columns * info->scale_bytes;
  repacked->zero_bytes = columns * info->zero_bits / 8;
  if (family == MARLIN_FAMILY_SM90_8BIT) {
    repacked->weight_bytes = (size_t)(sizes.n_padded / 64) *
                             marlin_ceil_div(sizes.k_padded, MARLIN_RECORD_K) *
                             marlin_record_bytes(info, group);
    repacked->scale_bytes = sizeof(float) * (group < 0 ? sizes.n_padded : 1);
    repacked->zero_bytes = 0;
  } else if (family != MARLIN_FAMILY_SM80) {
    repacked->scale_bytes += repacked->zero_bytes;
    repacked->zero_bytes = 0;
  }
  return MARLIN_OK;
}

marlin_status marlin_repack(const marlin_device* device, const marlin_layer* layer,
                            marlin_dtype activation, const uint32_t* b, const void* s,
                            const void* z, void* weights, void* scales, void* zeros) {
  marlin_stored stored;
  marlin_status status;
  const marlin_variant* variant =
      marlin_repack_target(device, layer, activation, &stored.sizes, &status);
  if (variant != NULL) status = marlin_check_zeros(layer, z != NULL);
  if (variant == NULL || status != MARLIN_OK) return status;
  stored.layer = layer;
  stored.info = &marlin_weight_infos[layer->type];
  stored.b = b;
  stored.s = s;
  stored.z = z;
  marlin_index_stored(&stored);
  const int family = marlin_first_kernel(variant)->family, group = variant->group_size;
  if (family == MARLIN_FAMILY_SM80)
    marlin_repack_sm80(&stored, group, weights, (char*)scales, (char*)zeros);
  else if (family == MARLIN_FAMILY_SM90_8BIT)
    marlin_repack_sm90_8bit(&stored, activation, group, variant->unit, (uint8_t*)weights,
                            (float*)scales);
  else
    marlin_repack_sm90(&stored, group, (uint32_t*)weights, (char*)scales);
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
  X(cuModuleUnload)            \
  X(cuModuleGetFunction)       \
  X(cuFuncSetAttribute) X(cuOccupancyMaxActiveClusters) X(cuLaunchKernelEx)

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

static int marlin_family_is_sm90(int family) {
  return family != MARLIN_FAMILY_SM80 && family != MARLIN_FAMILY_QUANTIZE;
}

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
  if (code == CUDA_SUCCESS && marlin_family_is_sm90(marlin_kernels[kernel].family))
    code = rt->call_cuFuncSetAttribute(rt->functions[kernel],
                                       CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100);
  if (code != CUDA_SUCCESS) {
    rt->functions[kernel] = NULL;
    return marlin_driver_error(rt, code, "cuModuleGetFunction, cuFuncSetAttribute");
  }
  return MARLIN_OK;
}

/* What cuLaunchKernelEx takes besides arguments. */
typedef struct {
  CUlaunchConfig config;
  CUlaunchAttribute attributes[2];
} marlin_launch;

static void marlin_describe(const marlin_plan* plan, CUstream stream, marlin_launch* launch) {
  CUlaunchConfig* config = &launch->config;
  memset(launch, 0, sizeof(*launch));
  config->gridDimX = plan->grid_x;
  config->gridDimY = plan->grid_y;
  config->gridDimZ = 1;
  config->blockDimX = plan->threads;
  config->blockDimY = config->blockDimZ = 1;
  config->sharedMemBytes = plan->shared_bytes;
  config->hStream = stream;
  config->attrs = launch->attributes;
  if (!marlin_family_is_sm90(marlin_kernels[plan->kernel].family)) return;
  /* Programmatic dependent launch: these kernels wait for their predecessors by themselves. */
  CUlaunchAttribute* attribute = &launch->attributes[config->numAttrs++];
  attribute->id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
  attribute->value.programmaticStreamSerializationAllowed = 1;
  if (plan->cluster == 1) return;
  attribute = &launch->attributes[config->numAttrs++];
  attribute->id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
  attribute->value.clusterDim.x = plan->cluster;
  attribute->value.clusterDim.y = attribute->value.clusterDim.z = 1;
}

static marlin_status marlin_function(marlin_runtime* rt, int kernel, CUfunction* function) {
  marlin_status status = MARLIN_OK;
  if (rt->functions[kernel] == NULL) status = marlin_load(rt, kernel);
  *function = rt->functions[kernel];
  return status;
}

marlin_status marlin_plan_gemm(marlin_runtime* rt, const marlin_problem* problem,
                               marlin_plan* plan) {
  marlin_status status = marlin_choose(&rt->device, problem, plan);
  if (status != MARLIN_OK) return status;
  const marlin_kernel* kernel = &marlin_kernels[plan->kernel];
  const marlin_variant* variant =
      marlin_find_variant(marlin_find_arch(&rt->device), &problem->layer, problem->activation,
                          problem);
  status = marlin_function(rt, plan->kernel, &plan->function);
  if (status == MARLIN_OK && variant->quantizer >= 0)
    status = marlin_function(rt, variant->quantizer, &plan->quantizer);
  if (status == MARLIN_OK && kernel->family == MARLIN_FAMILY_SM90_8BIT && kernel->split == 1 &&
      kernel->cluster > 1) {
    /* No more clusters than run at once: tiles are divided among all, and late ones would be late. */
    marlin_launch launch;
    int most = 0;
    marlin_describe(plan, NULL, &launch);
    const CUresult code =
        rt->call_cuOccupancyMaxActiveClusters(&most, plan->function, &launch.config);
    if (code != CUDA_SUCCESS) return marlin_driver_error(rt, code, "cuOccupancyMaxActiveClusters");
    plan->grid_x =
        (unsigned)marlin_min((int)plan->grid_x, marlin_max(1, most) * (int)plan->cluster);
  }
  return status;
}

/* Kernel arguments: csrc/sm80/tile_config.cuh, sm90/problem.cuh, sm90_8bit/config.cuh and
 * sm80/activations.cuh (a test compares them). */
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

typedef struct {
  const void *scale_a, *scale_b, *bias;
  void* out;
  const void* metadata;
  int scale_a_stride, scale_b_stride, m, n, k_tiles, feature_tiles;
  const void* weights;
} marlin_sm90_8bit_problem;

typedef struct {
  const void* activations;
  void *codes, *scales;
  long long row_stride;
  int m, k, k_padded;
} marlin_quantize_problem;

/* Boxes of `rows` tokens x 128 bytes of the activations, with the 128-byte swizzle (Python:
 * launch._tensor_map, scaled_mm._byte_map). */
static marlin_status marlin_tensor_map(const marlin_runtime* rt, const marlin_plan* plan,
                                       const marlin_operands* x, CUtensorMap* map) {
  const marlin_problem* p = &plan->problem;
  const marlin_kernel* kernel = &marlin_kernels[plan->kernel];
  const int bytes = kernel->family == MARLIN_FAMILY_SM90_8BIT ? 1 : 2; /* of an element */
  const int shares = bytes == 1 ? kernel->cluster / kernel->split : 1; /* blocks fetch one each */
  const CUtensorMapDataType type = bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : p->activation == MARLIN_FLOAT16
                                       ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const cuuint64_t sizes[2] = {(cuuint64_t)(bytes == 1 ? plan->k_padded : p->layer.k),
                               (cuuint64_t)p->m};
  const cuuint64_t strides[1] = {(cuuint64_t)x->row_stride * bytes};
  const cuuint32_t box[2] = {(cuuint32_t)(128 / bytes), (cuuint32_t)(kernel->tile_m / shares)};
  const cuuint32_t steps[2] = {1, 1};
  if (rt->encode == NULL)
    return marlin_fail(MARLIN_DRIVER, "this driver has no cuTensorMapEncodeTiled");
  if ((uintptr_t)x->a % 16 != 0 || strides[0] % 16 != 0)
    return marlin_fail(MARLIN_INVALID,
                       "rows of a must start on 16 bytes: address %p, row_stride=%lld", x->a,
                       x->row_stride);
  const CUresult code =
      rt->encode(map, type, 2, (void*)(uintptr_t)x->a, sizes, strides, box, steps,
                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? MARLIN_OK : marlin_driver_error(rt, code, "cuTensorMapEncodeTiled");
}

static int marlin_is_8bit(marlin_dtype activation) {
  return activation == MARLIN_INT8 || activation == MARLIN_FLOAT8_E4M3FN;
}

/* What a launch must have been given. */
static marlin_status marlin_check_operands(const marlin_plan* plan, const marlin_operands* x) {
  const marlin_problem* p = &plan->problem;
  const marlin_weight_info* info = &marlin_weight_infos[p->layer.type];
  const int eight_bit = marlin_is_8bit(p->activation);
  const int columns = eight_bit ? plan->k_padded : p->layer.k;
  const int apart = marlin_kernels[plan->kernel].family == MARLIN_FAMILY_SM80; /* zero points */
  if (plan->function == NULL)
    return marlin_fail(MARLIN_INVALID, "the plan is not from marlin_plan_gemm");
  if (x->a == NULL || x->weights == NULL || x->scales == NULL || x->out == NULL ||
      x->row_stride < columns)
    return marlin_fail(MARLIN_INVALID,
                       "a, weights, scales and out must be set, and row_stride=%lld at least %d",
                       x->row_stride, columns);
  if (eight_bit != (x->token_scales != NULL))
    return marlin_fail(MARLIN_INVALID, "token_scales come with 8-bit activations, and only then");
  if ((apart && info->zero_bits > 0) != (x->zeros != NULL))
    return marlin_fail(MARLIN_INVALID, "zeros must be %s for %s on this GPU",
                       x->zeros == NULL ? "set" : "NULL", info->name);
  if (info->global_scale != (x->global_scale != NULL))
    return marlin_fail(MARLIN_INVALID, "global_scale must be %s for %s",
                       x->global_scale == NULL ? "set" : "NULL", info->name);
  if ((plan->counter_bytes > 0 && x->counters == NULL) ||
      (plan->partial_bytes > 0 && x->partials == NULL))
    return marlin_fail(MARLIN_INVALID, "this plan needs %zu bytes of counters and %zu of partials",
                       plan->counter_bytes, plan->partial_bytes);
  return MARLIN_OK;
}

static void marlin_fill_sm80(const marlin_plan* plan, const marlin_operands* x,
                             marlin_sm80_problem* sm80) {
  const marlin_problem* p = &plan->problem;
  sm80->activations = x->a;
  sm80->weights = x->weights;
  sm80->scales = x->scales;
  sm80->zeros = x->zeros;
  sm80->permutation = NULL;
  sm80->token_scales = x->token_scales;
  sm80->global_scale = x->global_scale;
  sm80->bias = x->bias;
  sm80->output = x->out;
  sm80->partials = x->partials;
  sm80->arrivals = x->counters;
  sm80->row_stride = x->row_stride;
  sm80->m = p->m;
  sm80->n = p->layer.n;
  sm80->k = marlin_is_8bit(p->activation) ? plan->k_padded : p->layer.k;
  sm80->n_padded = plan->n_padded;
  sm80->k_padded = plan->k_padded;
  sm80->splits = plan->splits;
  sm80->in_turn = plan->in_turn;
}

static void marlin_fill_sm90(const marlin_plan* plan, const marlin_operands* x,
                             marlin_sm90_problem* sm90) {
  sm90->activations = x->a;
  sm90->weights = x->weights;
  sm90->scales = x->scales;
  sm90->bias = x->bias;
  sm90->out = x->out;
  sm90->row_stride = x->row_stride;
  sm90->m = plan->problem.m;
  sm90->n = plan->problem.layer.n;
  sm90->k = plan->problem.layer.k;
  sm90->column_tiles = plan->n_padded / 64;
  sm90->k_tiles = plan->k_padded / 64;
  sm90->split = plan->splits;
  sm90->whole_tiles = plan->whole_tiles;
  sm90->partials = x->partials;
  sm90->counters = x->counters;
  sm90->global_scale = x->global_scale;
}

static void marlin_fill_sm90_8bit(const marlin_plan* plan, const marlin_operands* x,
                                  marlin_sm90_8bit_problem* problem) {
  problem->scale_a = x->token_scales;
  problem->scale_b = x->scales;
  problem->bias = x->bias;
  problem->out = x->out;
  problem->metadata = NULL;
  problem->scale_a_stride = 1;
  problem->scale_b_stride = marlin_one_group(&plan->problem.layer);
  problem->m = plan->problem.m;
  problem->n = plan->problem.layer.n;
  problem->k_tiles = marlin_ceil_div(plan->k_padded, MARLIN_RECORD_K);
  problem->feature_tiles = plan->n_padded / 64;
  problem->weights = x->weights;
}

marlin_status marlin_gemm(const marlin_runtime* rt, const marlin_plan* plan,
                          const marlin_operands* x, CUstream stream) {
  const int family = marlin_kernels[plan->kernel].family;
  union {
    marlin_sm80_problem sm80;
    marlin_sm90_problem sm90;
    marlin_sm90_8bit_problem sm90_8bit;
  } problem;
  CUtensorMap map;
  marlin_launch launch;
  void* arguments[2];
  marlin_status status = marlin_check_operands(plan, x);
  if (status != MARLIN_OK) return status;
  marlin_describe(plan, stream, &launch);
  arguments[0] = &problem;
  arguments[1] = &map;
  if (family == MARLIN_FAMILY_SM80)
    marlin_fill_sm80(plan, x, &problem.sm80);
  else if (family == MARLIN_FAMILY_SM90_8BIT)
    marlin_fill_sm90_8bit(plan, x, &problem.sm90_8bit);
  else
    marlin_fill_sm90(plan, x, &problem.sm90);
  if (family == MARLIN_FAMILY_SM90_GEMM || family == MARLIN_FAMILY_SM90_8BIT)
    status = marlin_tensor_map(rt, plan, x, &map);
  if (status != MARLIN_OK) return status;
  const CUresult code =
      rt->call_cuLaunchKernelEx(&launch.config, plan->function, arguments, NULL);
  return code == CUDA_SUCCESS ? MARLIN_OK : marlin_driver_error(rt, code, "cuLaunchKernelEx");
}

marlin_status marlin_quantize(const marlin_runtime* rt, const marlin_plan* plan, const void* a,
                              long long row_stride, void* codes, float* token_scales,
                              CUstream stream) {
  const marlin_problem* p = &plan->problem;
  marlin_quantize_problem problem;
  CUlaunchConfig config;
  void* arguments[1] = {&problem};
  if (plan->quantizer == NULL)
    return marlin_fail(MARLIN_INVALID,
                       "the plan is not from marlin_plan_gemm, or not of 8-bit activations");
  if (a == NULL || codes == NULL || token_scales == NULL || row_stride < p->layer.k)
    return marlin_fail(MARLIN_INVALID,
                       "a, codes and token_scales must be set, and row_stride=%lld at least k=%d",
                       row_stride, p->layer.k);
  problem.activations = a;
  problem.codes = codes;
  problem.scales = token_scales;
  problem.row_stride = row_stride;
  problem.m = p->m;
  problem.k = p->layer.k;
  problem.k_padded = plan->k_padded;
  memset(&config, 0, sizeof(config));
  config.gridDimX = (unsigned)marlin_min(p->m, 8 * rt->device.multiprocessors);
  config.gridDimY = config.gridDimZ = 1;
  config.blockDimX = MARLIN_QUANTIZE_THREADS;
  config.blockDimY = config.blockDimZ = 1;
  config.sharedMemBytes = MARLIN_QUANTIZE_THREADS / 32 * sizeof(float);
  config.hStream = stream;
  const CUresult code = rt->call_cuLaunchKernelEx(&config, plan->quantizer, arguments, NULL);
  return code == CUDA_SUCCESS ? MARLIN_OK : marlin_driver_error(rt, code, "cuLaunchKernelEx");
}

#ifdef __cplusplus
}
#endif

#endif /* MARLIN_KERNEL_IMPLEMENTATION */
