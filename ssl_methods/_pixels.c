/* The colour operations of one view in one pass over its pixels; ssl_methods/colour.py says what they mean and holds the
 * same arithmetic in numpy. Results must be equal to the bit, so: float32 throughout, no fused multiply-add
 * (-ffp-contract=off), and sums in integers, whose order does not matter. */
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 512 }; /* pixels; three planes of float32 stay in the first-level cache */
enum { BRIGHTNESS, CONTRAST, SATURATION, HUE };
#define FRACTION 4096.0f /* steps of a level in which grey levels are summed; 512 pixels of them fit an int32 */

typedef struct {
    const uint8_t *source;
    uint8_t *target;
    int64_t num_pixels;
    int32_t channels, grey;
    const int32_t *kinds;
    const float *amounts;
    int32_t num_steps;
} Job;

typedef struct {
    float red[BLOCK], green[BLOCK], blue[BLOCK];
} Planes;

INLINE float clamp(float value, float high) {
    value = value > 0.0f ? value : 0.0f;
    return value < high ? value : high;
}

INLINE float luma(float red, float green, float blue) { return 0.2989f * red + 0.587f * green + 0.114f * blue; }

INLINE float distance(float one, float other) { return one > other ? one - other : other - one; }

INLINE void brighten(Planes *planes, int count, float factor) {
    for (int i = 0; i < count; i++) {
        planes->red[i] = clamp(factor * planes->red[i], 255.0f);
        planes->green[i] = clamp(factor * planes->green[i], 255.0f);
        planes->blue[i] = clamp(factor * planes->blue[i], 255.0f);
    }
}

INLINE void contrast(Planes *planes, int count, float factor, float mean) {
    const float rest = (1.0f - factor) * mean;
    for (int i = 0; i < count; i++) {
        planes->red[i] = clamp(factor * planes->red[i] + rest, 255.0f);
        planes->green[i] = clamp(factor * planes->green[i] + rest, 255.0f);
        planes->blue[i] = clamp(factor * planes->blue[i] + rest, 255.0f);
    }
}

INLINE void saturate(Planes *planes, int count, float factor) {
    for (int i = 0; i < count; i++) {
        const float rest = (1.0f - factor) * luma(planes->red[i], planes->green[i], planes->blue[i]);
        planes->red[i] = clamp(factor * planes->red[i] + rest, 255.0f);
        planes->green[i] = clamp(factor * planes->green[i] + rest, 255.0f);
        planes->blue[i] = clamp(factor * planes->blue[i] + rest, 255.0f);
    }
}

/* The hue is a place on a circle of six: red 0, yellow 1, green 2, cyan 3, blue 4, magenta 5. */
INLINE void turn_hue(Planes *planes, int count, float turn) {
    const float shift = 6.0f * turn;
    for (int i = 0; i < count; i++) {
        const float red = planes->red[i], green = planes->green[i], blue = planes->blue[i];
        const float not_blue = red > green ? red : green, high = not_blue > blue ? not_blue : blue;
        const float not_red = green < blue ? green : blue, low = not_red < red ? not_red : red;
        const float chroma = high - low, divisor = chroma > 0.0f ? chroma : 1.0f;
        const float to_red = green - blue, to_green = blue - red, to_blue = red - green;
        const float side = high == green ? to_green : to_blue, offset = high == green ? 2.0f : 4.0f;
        float hue = (high == red ? to_red : side) / divisor + (high == red ? 0.0f : offset) + shift;
        hue = hue < 0.0f ? hue + 6.0f : hue;
        hue = hue >= 6.0f ? hue - 6.0f : hue;
        planes->red[i] = low + chroma * clamp(distance(hue, 3.0f) - 1.0f, 1.0f);
        planes->green[i] = low + chroma * clamp(2.0f - distance(hue, 2.0f), 1.0f);
        planes->blue[i] = low + chroma * clamp(2.0f - distance(hue, 4.0f), 1.0f);
    }
}

/* Return how many pixels there were. */
INLINE int load(Planes *planes, const Job *job, int64_t start) {
    const int64_t left = job->num_pixels - start;
    const int count = left < BLOCK ? (int)left : BLOCK;
    const uint8_t *source = job->source + job->channels * start;
    if (job->channels == 3) {
        for (int i = 0; i < count; i++) {
            planes->red[i] = source[3 * i];
            planes->green[i] = source[3 * i + 1];
            planes->blue[i] = source[3 * i + 2];
        }
    } else {
        for (int i = 0; i < count; i++) planes->red[i] = planes->green[i] = planes->blue[i] = source[i];
    }
    return count;
}

INLINE uint8_t rounded(float level) { return (uint8_t)(int32_t)(level + 0.5f); }

INLINE void store(const Planes *planes, const Job *job, int64_t start, int count) {
    uint8_t *target = job->target + (job->grey ? 1 : job->channels) * start;
    if (job->grey) {
        for (int i = 0; i < count; i++)
            target[i] = rounded(luma(planes->red[i], planes->green[i], planes->blue[i]));
    } else if (job->channels == 3) {
        for (int i = 0; i < count; i++) {
            target[3 * i] = rounded(planes->red[i]);
            target[3 * i + 1] = rounded(planes->green[i]);
            target[3 * i + 2] = rounded(planes->blue[i]);
        }
    } else {
        for (int i = 0; i < count; i++) target[i] = rounded(planes->red[i]);
    }
}

INLINE void apply(Planes *planes, int count, const Job *job, int num_steps, float mean) {
    for (int step = 0; step < num_steps; step++) {
        const float amount = job->amounts[step];
        switch (job->kinds[step]) {
        case BRIGHTNESS: brighten(planes, count, amount); break;
        case CONTRAST: contrast(planes, count, amount, mean); break;
        case SATURATION: saturate(planes, count, amount); break;
        case HUE: turn_hue(planes, count, amount); break;
        }
    }
}

INLINE int32_t grey_sum(const Planes *planes, int count) {
    int32_t sum = 0;
    for (int i = 0; i < count; i++)
        sum += (int32_t)(luma(planes->red[i], planes->green[i], planes->blue[i]) * FRACTION + 0.5f);
    return sum;
}

INLINE void run(const Job *job) {
    Planes planes;
    float mean = 0.0f;
    int before = 0;
    while (before < job->num_steps && job->kinds[before] != CONTRAST) before++;
    if (before < job->num_steps) {
        int64_t sum = 0;
        for (int64_t start = 0; start < job->num_pixels; start += BLOCK) {
            const int count = load(&planes, job, start);
            apply(&planes, count, job, before, 0.0f);
            sum += grey_sum(&planes, count);
        }
        mean = (float)((double)sum / (FRACTION * (double)job->num_pixels));
    }
    for (int64_t start = 0; start < job->num_pixels; start += BLOCK) {
        const int count = load(&planes, job, start);
        apply(&planes, count, job, job->num_steps, mean);
        store(&planes, job, start, count);
    }
}

/* The same function for three generations of processors; all give equal bits. */
static void run_on_any(const Job *job) { run(job); }
#if defined(__x86_64__) && defined(__GNUC__)
#ifdef __clang__
#define WIDE
#else
#define WIDE ",prefer-vector-width=512" /* GCC halves the vectors otherwise, and the speed */
#endif
__attribute__((target("arch=x86-64-v3"))) static void run_on_v3(const Job *job) { run(job); }
__attribute__((target("arch=x86-64-v4" WIDE))) static void run_on_v4(const Job *job) { run(job); }
#endif

/* `steps`: all kinds (int32), then all amounts (float). `target` has one channel if `grey` or if the source has; it may be `source`. At most one step is CONTRAST.
 * `widest`: vectors of the processor to use at most, in bits (128, 256, 512). */
void recolour(const uint8_t *source, uint8_t *target, int64_t num_pixels, int32_t channels, int32_t grey,
              const void *steps, int32_t num_steps, int32_t widest) {
    const int32_t *kinds = steps;
    const Job job = {source, target, num_pixels, channels, grey, kinds, (const float *)(kinds + num_steps), num_steps};
#if defined(__x86_64__) && defined(__GNUC__)
    if (widest >= 512 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd")) {
        run_on_v4(&job);
        return;
    }
    if (widest >= 256 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi2")) {
        run_on_v3(&job);
        return;
    }
#else
    (void)widest;
#endif
    run_on_any(&job);
}
