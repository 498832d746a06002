/* A libcuda.so.1 that does nothing but remember kernel launches, so that the launch path runs without a GPU.
   cuda.bindings asks cuGetProcAddress for every entry point; those not named here succeed and do nothing. */
#include <stdint.h>
#include <string.h>

typedef struct {
  int count;                         /* launches so far */
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  unsigned attributes;               /* launch attributes: bit i set for attribute number i */
  unsigned cluster[3];
  unsigned char arguments[128];      /* what the kernel's first parameter points to */
  int shared_limit;                  /* last MAX_DYNAMIC_SHARED_SIZE_BYTES set on a function */
  int result;                        /* what the next launches return */
} Record;
static Record record;
Record* fake_record(void) { return &record; }

/* The beginning of CUlaunchConfig and of CUlaunchAttribute, as cuda.h lays them out. */
typedef struct {
  int id;
  char pad[4];
  union { char bytes[64]; unsigned cluster[3]; } value;
} Attribute;
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;
enum { ATTRIBUTE_CLUSTER = 4, FUNCTION_SHARED_LIMIT = 8 };

static int launch(const Config* config, void* function, void** parameters, void** extra) {
  record.count++;
  memcpy(record.grid, config->grid, sizeof(record.grid));
  memcpy(record.block, config->block, sizeof(record.block));
  record.shared_bytes = config->shared_bytes;
  record.stream = config->stream;
  record.attributes = 0;
  memset(record.cluster, 0, sizeof(record.cluster));
  for (unsigned i = 0; i < config->count; i++) {
    record.attributes |= 1u << config->attributes[i].id;
    if (config->attributes[i].id == ATTRIBUTE_CLUSTER)
      memcpy(record.cluster, config->attributes[i].value.cluster, sizeof(record.cluster));
  }
  memcpy(record.arguments, parameters[0], sizeof(record.arguments));
  return record.result;
}
static int set_attribute(void* function, int attribute, int value) {
  if (attribute == FUNCTION_SHARED_LIMIT) record.shared_limit = value;
  return 0;
}
static int handle(void** out) {
  *out = (void*)0x1000;
  return 0;
}
static int version(int* out) {
  *out = 13000;
  return 0;
}
static int error_text(int code, const char** out) {
  *out = "made up by the fake driver";
  return 0;
}
static int nothing(void) { return 0; }

int cuGetProcAddress_v2(const char* name, void** out, int v, uint64_t flags, int* status) {
  static const struct { const char* name; void* function; } table[] = {
      {"cuLaunchKernelEx", (void*)launch},       {"cuFuncSetAttribute", (void*)set_attribute},
      {"cuModuleLoadData", (void*)handle},       {"cuModuleGetFunction", (void*)handle},
      {"cuDriverGetVersion", (void*)version},    {"cuGetErrorString", (void*)error_text},
      {"cuGetProcAddress", (void*)cuGetProcAddress_v2},
  };
  if (status) *status = 0;
  *out = (void*)nothing;
  for (unsigned i = 0; i < sizeof(table) / sizeof(table[0]); i++)
    if (!strcmp(name, table[i].name)) *out = table[i].function;
  return 0;
}
int cuGetProcAddress(const char* name, void** out, int v, uint64_t flags) {
  return cuGetProcAddress_v2(name, out, v, flags, 0);
}
int cuInit(unsigned flags) { return 0; }
