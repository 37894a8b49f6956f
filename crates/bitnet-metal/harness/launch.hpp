// What the simulator is asked to do, and the memory it works on. The functions that read a launch
// and call a kernel are generated from the kernels' text and follow it.
#pragma once
#include <sys/mman.h>
#include <unistd.h>
#include "fibers.hpp"

namespace simulator {

// One dispatch. Buffers are in the order of their indices; what Metal copies at once (`setBytes`)
// is a buffer too.
struct Launch {
    const char* name;
    void* const* buffers;
    const uint64_t* lengths;
    uint32_t n_buffers;
    uint32_t threadgroup_bytes;
    uint32_t groups[3];
    uint32_t threads;
    uint32_t seed;
};

// Memory that ends where a page begins that nobody may touch.
inline void* allocate(size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE));
    size_t padded = (bytes + 15) / 16 * 16;
    if (bytes == 0 || padded > SIZE_MAX / 2) return nullptr;
    size_t whole = (padded + page - 1) / page * page;
    void* base = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    mprotect(static_cast<char*>(base) + whole, page, PROT_NONE);
    return static_cast<char*>(base) + whole - padded;
}

inline void release(void* start, size_t bytes) {
    size_t page = size_t(sysconf(_SC_PAGESIZE));
    size_t padded = (bytes + 15) / 16 * 16;
    size_t whole = (padded + page - 1) / page * page;
    munmap(static_cast<char*>(start) + padded - whole, whole + page);
}

// The threadgroup that runs now.
struct Position {
    const Launch* launch;
    uint32_t group[3];
    void* shared;
};

inline thread_local Position position;

// Threadgroup memory of this CPU thread, with a guard behind it.
struct Shared {
    void* start = nullptr;
    size_t bytes = 0;
    void* of(size_t wanted) {
        if (wanted != bytes) {
            if (start != nullptr) release(start, bytes);
            start = wanted == 0 ? nullptr : allocate(wanted);
            bytes = wanted;
        }
        return start;
    }
    ~Shared() {
        if (start != nullptr) release(start, bytes);
    }
};

inline thread_local Shared shared;

// Runs all threadgroups; null, or what is wrong.
inline const char* run(const Launch& launch, void (*body)(const void*)) {
    if (launch.threads == 0 || launch.threads % SIMD_WIDTH != 0 || launch.threads > 1024)
        return "threads of a threadgroup are a multiple of 32, at most 1024";
    if (launch.threadgroup_bytes > 32768) return "a threadgroup has 32 KiB of memory";
    if (launch.threadgroup_bytes % 16 != 0) return "threadgroup memory comes in multiples of 16 bytes";
    uint64_t random = launch.seed;
    position.launch = &launch;
    position.shared = shared.of(launch.threadgroup_bytes);
    for (uint32_t z = 0; z < launch.groups[2]; z++) {
        for (uint32_t y = 0; y < launch.groups[1]; y++) {
            for (uint32_t x = 0; x < launch.groups[0]; x++) {
                position.group[0] = x, position.group[1] = y, position.group[2] = z;
                // What stands in threadgroup memory at first is undefined: NaN, and indices far off.
                if (position.shared != nullptr) memset(position.shared, 0xff, launch.threadgroup_bytes);
                if (!run_group(launch.threads, launch.seed, random++ * 0x9e3779b97f4a7c15ull, body, nullptr))
                    return group.error;
            }
        }
    }
    return nullptr;
}

} // namespace simulator

extern "C" void* bitnet_metal_allocate(size_t bytes) { return simulator::allocate(bytes); }
extern "C" void bitnet_metal_release(void* start, size_t bytes) { simulator::release(start, bytes); }
