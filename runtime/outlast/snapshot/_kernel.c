/* The copy kernel of rank images: one pass that copies with non-temporal stores and hashes while the bytes are in cache.
 *
 * XXH64 is written from its public specification (xxHash fast digest algorithm, version 0.1.1, section "XXH64
 * algorithm description", https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md), seed 0. A block's digest is
 * that of its file bytes, whichever segments they came from: the hash state is carried across segments.
 *
 * Called through ctypes, so without the GIL; touches no Python object and allocates nothing. Little-endian machines.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "images are little-endian and so must the machine be"
#endif

/* Which stores are compiled in: 0 plain, 1 non-temporal SSE2, 2 also AVX2 where the processor has it. */
#ifndef KERNEL_STORES
#ifdef __x86_64__
#define KERNEL_STORES 2
#else
#define KERNEL_STORES 0
#endif
#endif

#if KERNEL_STORES
#include <immintrin.h>
#endif

#define KERNEL_VERSION 1
#define LINE 64    /* a cache line: what one write-combining buffer holds */
#define STRIPE 32  /* what one step of XXH64 takes in */
#define CHUNK 4096 /* what the cached paths hash at a time */
#define AHEAD 2048 /* how far ahead of the copy its source is prefetched */

#define P1 0x9E3779B185EBCA87ULL
#define P2 0xC2B2AE3D27D4EB4FULL
#define P3 0x165667B19E3779F9ULL
#define P4 0x85EBCA77C2B2AE63ULL
#define P5 0x27D4EB2F165667C5ULL

typedef struct {
    uint64_t offset;      /* in the file; segments follow one another without a hole */
    const uint8_t *source; /* NULL: zeros; the destination itself: already there, hash it only */
    uint64_t length;
} segment;

typedef struct {
    uint64_t lane[4];
    uint64_t total;
    unsigned filled; /* bytes waiting in tail, < STRIPE */
    uint8_t tail[STRIPE];
} hash;

typedef void (*stream_function)(hash *, uint8_t *, const uint8_t *, size_t);

static const uint8_t zeros[CHUNK];

static inline uint64_t rotate(uint64_t value, int bits) { return (value << bits) | (value >> (64 - bits)); }

static inline uint64_t read64(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint32_t read32(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static inline uint64_t mix(uint64_t lane, uint64_t input) {
    lane += input * P2;
    /* Keeps the four lanes in four scalar registers: GCC's vectorizer would emulate the 64-bit products (2.5x slower). */
    __asm__("" : "+r"(lane));
    return rotate(lane, 31) * P1;
}

static inline uint64_t merge(uint64_t digest, uint64_t lane) { return (digest ^ mix(0, lane)) * P1 + P4; }

static void hash_reset(hash *state) {
    state->lane[0] = P1 + P2;
    state->lane[1] = P2;
    state->lane[2] = 0;
    state->lane[3] = 0 - P1;
    state->total = 0;
    state->filled = 0;
}

/* Takes in whole stripes; `length` is a multiple of STRIPE. */
static void hash_stripes(hash *state, const uint8_t *data, size_t length) {
    uint64_t a = state->lane[0], b = state->lane[1], c = state->lane[2], d = state->lane[3];
    for (size_t at = 0; at < length; at += STRIPE) {
        a = mix(a, read64(data + at));
        b = mix(b, read64(data + at + 8));
        c = mix(c, read64(data + at + 16));
        d = mix(d, read64(data + at + 24));
    }
    state->lane[0] = a, state->lane[1] = b, state->lane[2] = c, state->lane[3] = d;
    state->total += length;
}

static void hash_update(hash *state, const uint8_t *data, size_t length) {
    if (state->filled) {
        size_t taken = STRIPE - state->filled;
        if (taken > length) taken = length;
        memcpy(state->tail + state->filled, data, taken);
        state->filled += (unsigned)taken;
        data += taken, length -= taken;
        if (state->filled < STRIPE) return;
        hash_stripes(state, state->tail, STRIPE);
        state->filled = 0;
    }
    size_t whole = length & ~(size_t)(STRIPE - 1);
    hash_stripes(state, data, whole);
    memcpy(state->tail, data + whole, length - whole);
    state->filled = (unsigned)(length - whole);
}

/* The remaining input and the avalanche: specification, steps 4 to 6. */
static uint64_t hash_digest(const hash *state) {
    const uint64_t *v = state->lane;
    uint64_t digest = v[2] + P5;
    if (state->total) {
        digest = rotate(v[0], 1) + rotate(v[1], 7) + rotate(v[2], 12) + rotate(v[3], 18);
        for (int i = 0; i < 4; i++) digest = merge(digest, v[i]);
    }
    digest += state->total + state->filled;
    const uint8_t *at = state->tail, *end = at + state->filled;
    for (; end - at >= 8; at += 8) digest = rotate(digest ^ mix(0, read64(at)), 27) * P1 + P4;
    for (; end - at >= 4; at += 4) digest = rotate(digest ^ (read32(at) * P1), 23) * P2 + P3;
    for (; at < end; at++) digest = rotate(digest ^ (*at * P5), 11) * P1;
    digest = (digest ^ (digest >> 33)) * P2;
    digest = (digest ^ (digest >> 29)) * P3;
    return digest ^ (digest >> 32);
}

/* Copy and hash whole lines: `to` is aligned to a line, `length` a multiple of it, and no tail waits in `state`. */
#if KERNEL_STORES
#define STREAM_LOOP(COPY_LINE)                                                                      \
    uint64_t a = state->lane[0], b = state->lane[1], c = state->lane[2], d = state->lane[3];        \
    for (size_t at = 0; at < length; at += LINE) {                                                  \
        const uint8_t *f = from + at;                                                               \
        uint8_t *t = to + at;                                                                       \
        _mm_prefetch((const char *)f + AHEAD, _MM_HINT_T0);                                         \
        COPY_LINE                                                                                   \
        a = mix(a, read64(f)), b = mix(b, read64(f + 8));                                           \
        c = mix(c, read64(f + 16)), d = mix(d, read64(f + 24));                                     \
        a = mix(a, read64(f + 32)), b = mix(b, read64(f + 40));                                     \
        c = mix(c, read64(f + 48)), d = mix(d, read64(f + 56));                                     \
    }                                                                                               \
    state->lane[0] = a, state->lane[1] = b, state->lane[2] = c, state->lane[3] = d;                 \
    state->total += length;

static void stream_sse2(hash *state, uint8_t *to, const uint8_t *from, size_t length) {
    STREAM_LOOP(for (int i = 0; i < LINE; i += 16)
                    _mm_stream_si128((__m128i *)(t + i), _mm_loadu_si128((const __m128i *)(f + i)));)
}

#if KERNEL_STORES == 2
__attribute__((target("avx2"))) static void stream_avx2(hash *state, uint8_t *to, const uint8_t *from, size_t length) {
    STREAM_LOOP(for (int i = 0; i < LINE; i += 32)
                    _mm256_stream_si256((__m256i *)(t + i), _mm256_loadu_si256((const __m256i *)(f + i)));)
}

static stream_function choose_stream(void) { return __builtin_cpu_supports("avx2") ? stream_avx2 : stream_sse2; }
#else
static stream_function choose_stream(void) { return stream_sse2; }
#endif
static void order_stores(void) { _mm_sfence(); }
#else
static void stream_plain(hash *state, uint8_t *to, const uint8_t *from, size_t length) {
    for (size_t at = 0; at < length; at += CHUNK) {
        size_t part = length - at < CHUNK ? length - at : CHUNK;
        memcpy(to + at, from + at, part);
        hash_stripes(state, from + at, part);
    }
}

static stream_function choose_stream(void) { return stream_plain; }
static void order_stores(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
#endif

/* The rest of a segment, or one that starts off a line: cached stores, hashed chunk by chunk. */
static void copy_cached(hash *state, uint8_t *to, const uint8_t *from, size_t length) {
    for (size_t at = 0; at < length; at += CHUNK) {
        size_t part = length - at < CHUNK ? length - at : CHUNK;
        const uint8_t *source = from ? from + at : zeros;
        memcpy(to + at, source, part);
        hash_update(state, source, part);
    }
}

static void copy_part(hash *state, stream_function stream, uint8_t *to, const uint8_t *from, size_t length) {
    if (from == to) {
        hash_update(state, from, length);
        return;
    }
    size_t lines = 0;
    if (from && !state->filled && (uintptr_t)to % LINE == 0) {
        lines = length & ~(size_t)(LINE - 1);
        stream(state, to, from, lines);
    }
    copy_cached(state, to + lines, from ? from + lines : NULL, length - lines);
}

int outlast_kernel_version(void) { return KERNEL_VERSION; }

/* Copies `count` segments to `out` and writes the digest of every `block` bytes (the last may be shorter) to `sums`.
 * `done` counts the bytes copied so far, block by block. Returns 0, or 1 + the index of a segment that leaves a hole. */
size_t outlast_copy_and_hash(const segment *segments, size_t count, uint8_t *out, uint64_t block, uint64_t *sums,
                             volatile uint64_t *done) {
    stream_function stream = choose_stream();
    hash state;
    uint64_t at = 0, room = block;
    hash_reset(&state);
    for (size_t i = 0; i < count; i++) {
        const uint8_t *from = segments[i].source;
        if (segments[i].offset != at) return i + 1;
        for (uint64_t left = segments[i].length; left;) {
            uint64_t part = left < room ? left : room;
            copy_part(&state, stream, out + at, from, part);
            at += part, left -= part, room -= part;
            if (from) from += part;
            if (room) continue;
            *sums++ = hash_digest(&state);
            hash_reset(&state);
            room = block;
            *done = at;
        }
    }
    if (room != block) *sums = hash_digest(&state);
    order_stores();
    *done = at;
    return 0;
}

/* Writes the digest of every `block` bytes of `data` (the last may be shorter) to `sums`. */
void outlast_hash_blocks(const uint8_t *data, uint64_t length, uint64_t block, uint64_t *sums) {
    for (uint64_t at = 0; at < length; at += block) {
        hash state;
        hash_reset(&state);
        hash_update(&state, data + at, length - at < block ? length - at : block);
        *sums++ = hash_digest(&state);
    }
}
