// Threads of one threadgroup as fibers of one CPU thread, so that barriers and simdgroup operations
// are real: a fiber that reaches one waits until the others are there.
//
// Between two barriers the order in which fibers run is chosen by a seed, and simdgroups run one
// after the other, so that a kernel that forgets a barrier meets a schedule in which it is wrong.
// Reports what no kernel may do: a barrier or an operation that some threads never reach, or reach
// at different places of the text. Knows no Metal types.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

// Saves the callee-saved registers on the current stack, stores the stack's pointer in *from, and
// goes on with the stack at `to`.
extern "C" void bitnet_metal_switch(void** from, void* to) __asm__("bitnet_metal_switch");
#if defined(__x86_64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    "bitnet_metal_switch:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
// Registers saved, then the address to return to.
constexpr size_t SAVED_WORDS = 6;
constexpr size_t RETURN_WORD = 6;
#elif defined(__aarch64__)
__asm__(
    ".text\n"
    ".p2align 4\n"
    "bitnet_metal_switch:\n"
    "  sub sp, sp, #160\n"
    "  stp x19, x20, [sp]\n  stp x21, x22, [sp, #16]\n  stp x23, x24, [sp, #32]\n"
    "  stp x25, x26, [sp, #48]\n  stp x27, x28, [sp, #64]\n  stp x29, x30, [sp, #80]\n"
    "  stp d8, d9, [sp, #96]\n  stp d10, d11, [sp, #112]\n  stp d12, d13, [sp, #128]\n"
    "  stp d14, d15, [sp, #144]\n"
    "  mov x2, sp\n  str x2, [x0]\n  mov sp, x1\n"
    "  ldp x19, x20, [sp]\n  ldp x21, x22, [sp, #16]\n  ldp x23, x24, [sp, #32]\n"
    "  ldp x25, x26, [sp, #48]\n  ldp x27, x28, [sp, #64]\n  ldp x29, x30, [sp, #80]\n"
    "  ldp d8, d9, [sp, #96]\n  ldp d10, d11, [sp, #112]\n  ldp d12, d13, [sp, #128]\n"
    "  ldp d14, d15, [sp, #144]\n"
    "  add sp, sp, #160\n  ret\n");
constexpr size_t SAVED_WORDS = 20;
constexpr size_t RETURN_WORD = 11;
#else
#error "no fibers for this processor"
#endif

namespace simulator {

constexpr unsigned SIMD_WIDTH = 32;
constexpr size_t STACK_BYTES = 32 * 1024;
constexpr uint64_t STACK_END = 0x5afe57ac5afe57acull;

enum class State { Ready, InSimdgroup, AtBarrier, Done };

struct Fiber {
    void* stack_pointer;
    State state;
    // What it waits in: the operation and the line of the kernel's text.
    int operation;
    int line;
    // Exchanges it took part in: tells which of two rows of slots is in use.
    unsigned exchanges;
    std::unique_ptr<uint64_t[]> stack;
};

// What a thread hands to the others of its simdgroup.
struct Slot {
    alignas(16) unsigned char bytes[16];
};

struct Group {
    std::vector<Fiber> fibers;
    std::vector<Slot> slots; // (2, fibers)
    void* scheduler = nullptr;
    unsigned current = 0;
    unsigned n_threads = 0;
    uint64_t random = 0;
    unsigned seed = 0;
    void (*body)(const void*) = nullptr;
    const void* argument = nullptr;
    char error[256] = "";
};

inline thread_local Group group;

inline void suspend(State state, int operation, int line) {
    Fiber& fiber = group.fibers[group.current];
    fiber.state = state;
    fiber.operation = operation;
    fiber.line = line;
    bitnet_metal_switch(&fiber.stack_pointer, group.scheduler);
}

inline void barrier(int line) { suspend(State::AtBarrier, 0, line); }

inline void simdgroup_rendezvous(int operation, int line) { suspend(State::InSimdgroup, operation, line); }

// Hands `value` to the simdgroup; afterwards `read(lane)` of the result sees every lane's value,
// until the exchange after the next.
template <class T> struct Exchange {
    const Slot* slots;
    T read(unsigned lane) const {
        T value;
        memcpy(&value, slots[lane].bytes, sizeof value);
        return value;
    }
};

template <class T> Exchange<T> exchange(T value, int operation, int line) {
    static_assert(sizeof(T) <= sizeof(Slot), "a value is exchanged in one slot");
    Fiber& fiber = group.fibers[group.current];
    Slot* row = group.slots.data() + (fiber.exchanges++ % 2) * group.n_threads;
    memcpy(row[group.current].bytes, &value, sizeof value);
    simdgroup_rendezvous(operation, line);
    return Exchange<T>{row + group.current / SIMD_WIDTH * SIMD_WIDTH};
}

inline unsigned lane() { return group.current % SIMD_WIDTH; }

inline void start() {
    group.body(group.argument);
    suspend(State::Done, 0, 0);
    std::abort(); // A finished fiber is never resumed.
}

// The order of `n` things for the next stretch: ascending, descending, or shuffled.
inline void choose_order(unsigned* order, unsigned n) {
    for (unsigned i = 0; i < n; i++) {
        order[i] = group.seed % 2 == 0 ? i : n - 1 - i;
    }
    if (group.seed < 2) return;
    for (unsigned i = n; i > 1; i--) {
        group.random = group.random * 6364136223846793005ull + 1442695040888963407ull;
        std::swap(order[i - 1], order[(group.random >> 33) % i]);
    }
}

inline bool fail(const char* what, unsigned there, unsigned all, int line) {
    snprintf(group.error, sizeof group.error, "line %d: %s: %u of %u threads are there", line, what, there, all);
    return false;
}

// Runs one simdgroup until its threads are done or wait at a barrier; false on an error.
inline bool run_simdgroup(unsigned first) {
    Fiber* fibers = group.fibers.data() + first;
    for (;;) {
        unsigned order[SIMD_WIDTH];
        choose_order(order, SIMD_WIDTH);
        for (unsigned i : order) {
            if (fibers[i].state != State::Ready) continue;
            group.current = first + i;
            bitnet_metal_switch(&group.scheduler, fibers[i].stack_pointer);
            if (group.error[0] != 0) return false;
            if (fibers[i].stack[0] != STACK_END) {
                snprintf(group.error, sizeof group.error, "a thread needs more than %zu bytes of stack", STACK_BYTES);
                return false;
            }
        }
        unsigned waiting = 0, same = 0;
        const Fiber* one = nullptr;
        for (unsigned i = 0; i < SIMD_WIDTH; i++) {
            if (fibers[i].state != State::InSimdgroup) continue;
            waiting++;
            if (one == nullptr) one = fibers + i;
            same += fibers[i].operation == one->operation && fibers[i].line == one->line;
        }
        if (waiting == 0) return true;
        if (same != SIMD_WIDTH) return fail("a simdgroup operation in divergent control flow", same, SIMD_WIDTH, one->line);
        for (unsigned i = 0; i < SIMD_WIDTH; i++) fibers[i].state = State::Ready;
    }
}

// Runs `body(argument)` once in each of `n` threads, a multiple of SIMD_WIDTH; false on an error.
inline bool run_group(unsigned n, unsigned seed, uint64_t random, void (*body)(const void*), const void* argument) {
    group.n_threads = n;
    group.seed = seed;
    group.random = random;
    group.body = body;
    group.argument = argument;
    group.error[0] = 0;
    if (group.fibers.size() < n) group.fibers.resize(n);
    if (group.slots.size() < 2 * n) group.slots.resize(2 * n);
    for (unsigned i = 0; i < n; i++) {
        Fiber& fiber = group.fibers[i];
        constexpr size_t words = STACK_BYTES / 8;
        if (!fiber.stack) fiber.stack.reset(new uint64_t[words]);
        fiber.stack[0] = STACK_END;
        // As if `start` had been called: its return address lies 8 bytes below a multiple of 16.
        uintptr_t top = (reinterpret_cast<uintptr_t>(fiber.stack.get() + words) & ~uintptr_t(15)) - 64;
        uint64_t* saved = reinterpret_cast<uint64_t*>(top) - SAVED_WORDS;
        memset(saved, 0, (SAVED_WORDS + 1) * 8);
        saved[RETURN_WORD] = reinterpret_cast<uintptr_t>(&start);
        fiber.stack_pointer = saved;
        fiber.state = State::Ready;
        fiber.exchanges = 0;
    }
    std::vector<unsigned> order(n / SIMD_WIDTH);
    for (;;) {
        choose_order(order.data(), n / SIMD_WIDTH);
        for (unsigned s : order) {
            if (!run_simdgroup(s * SIMD_WIDTH)) return false;
        }
        unsigned done = 0, same = 0;
        const Fiber* one = nullptr;
        for (unsigned i = 0; i < n; i++) {
            const Fiber& fiber = group.fibers[i];
            done += fiber.state == State::Done;
            if (fiber.state != State::AtBarrier) continue;
            if (one == nullptr) one = &fiber;
            same += fiber.line == one->line;
        }
        if (done == n) return true;
        if (same != n) return fail("a barrier in divergent control flow", same, n, one->line);
        for (unsigned i = 0; i < n; i++) group.fibers[i].state = State::Ready;
    }
}

} // namespace simulator
