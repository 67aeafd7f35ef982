// A libcuda.so.1 without a device: what Triton's driver and launcher ask of it, and launches that return at once.
// stub_record(1) keeps each launch as bytes: grid, block, shared memory, function, stream, number of attributes, and
// the kernel's parameters, whose number and sizes stub_declare has told. stub_take hands them over.
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int Result;
enum { kMostFunctions = 4096, kMostParameters = 96, kLog = 1 << 20 };

typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned attribute_count;
} Config;  // CUlaunchConfig

static int counts[kMostFunctions], sizes[kMostFunctions][kMostParameters];
static intptr_t functions = 0;
static char log_bytes[kLog];
static size_t used = 0;
static int recording = 0;

intptr_t stub_functions(void) { return functions; }
void stub_record(int on) { recording = on, used = 0; }
const char* stub_log(void) { return log_bytes; }
size_t stub_used(void) { return used; }

int stub_declare(intptr_t function, int count, const int* bytes) {
  if (function < 1 || function >= kMostFunctions || count > kMostParameters) return 1;
  counts[function] = count;
  memcpy(sizes[function], bytes, count * sizeof(int));
  return 0;
}

static int keep(const void* from, size_t bytes) {
  if (used + bytes > kLog) return 1;
  memcpy(log_bytes + used, from, bytes);
  used += bytes;
  return 0;
}

Result cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  (void)extra;
  if (!recording) return 0;
  const intptr_t index = (intptr_t)function;
  const int64_t head[10] = {config->grid[0], config->grid[1], config->grid[2], config->block[0], config->shared,
                            index, (int64_t)config->stream, config->attribute_count, counts[index], 0};
  if (keep(head, sizeof(head))) return 2;
  for (int k = 0; k < counts[index]; ++k) {
    int64_t value = 0;
    memcpy(&value, parameters[k], sizes[index][k]);
    if (keep(&value, sizeof(value))) return 2;
  }
  return 0;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 8: *value = 49152; break;    // shared memory of a block
    case 10: *value = 32; break;      // threads of a warp
    case 12: *value = 65536; break;   // registers
    case 16: *value = 132; break;     // multiprocessors
    case 97: *value = 232448; break;  // shared memory that a block may opt into
    default: *value = 1;
  }
  return 0;
}

Result cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module, (void)name;
  if (functions + 1 >= kMostFunctions) return 2;
  *function = (void*)++functions;
  return 0;
}

Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  (void)function;
  *value = attribute == 0 ? 1024 : 0;  // threads of a block
  return 0;
}

Result cuPointerGetAttribute(void* value, int attribute, uint64_t address) {
  (void)attribute;
  *(uint64_t*)value = address;
  return 0;
}

Result cuGetErrorString(Result error, const char** text) { return (void)error, *text = "out of the stub's room", 0; }
Result cuDevicePrimaryCtxRetain(void** context, int device) { return (void)device, *context = (void*)1, 0; }
Result cuCtxSetCurrent(void* context) { return (void)context, 0; }
Result cuCtxGetCurrent(void** context) { return *context = (void*)1, 0; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return (void)limit, (void)value, 0; }
Result cuCtxGetLimit(size_t* value, int limit) { return (void)limit, *value = 0, 0; }
Result cuDriverGetVersion(int* version) { return *version = 13000, 0; }
Result cuModuleLoadData(void** module, const void* image) { return (void)image, *module = (void*)1, 0; }
Result cuFuncSetAttribute(void* function, int attribute, int value) {
  return (void)function, (void)attribute, (void)value, 0;
}
Result cuFuncSetCacheConfig(void* function, int config) { return (void)function, (void)config, 0; }
Result cuTensorMapEncodeTiled(void) { return 1; }
Result cuTensorMapEncodeIm2col(void) { return 1; }
Result cuOccupancyMaxActiveClusters(int* count, void* function, const Config* config) {
  return (void)function, (void)config, *count = 1, 0;
}
