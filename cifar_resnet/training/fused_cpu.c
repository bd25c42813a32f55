/* Max pooling, batch normalisation, ReLU and a residual, forward and backward; `fused_cpu.py` compiles and calls these functions.

   An activation is a matrix: a row for each pixel of each image, as channels-last memory has it, and a column for each channel. `rows`
   are those after pooling, and `width` is that of an image after pooling. A thread goes through the rows of a part. A sum over rows is
   one sum for each part: so the order of additions is the same for any number of threads. */

/* No header: where there is a compiler, those of a C library may be missing. */
typedef unsigned char uint8_t;
typedef unsigned int uint32_t;

#if BFLOAT16
typedef unsigned short element;

static inline float get(element x) {
    union { uint32_t bits; float value; } wide = {.bits = (uint32_t)x << 16};
    return wide.value;
}

static inline element put(float x) { /* rounds to the nearest, and of two to the even one; NaN stays NaN */
    union { float value; uint32_t bits; } wide = {.value = x};
    uint32_t rounded = (wide.bits + 0x7fff + (wide.bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : rounded;
}
#else
typedef float element;
static inline float get(element x) { return x; }
static inline element put(float x) { return x; }
#endif

#define EACH_PART _Pragma("omp parallel for schedule(static)") for (long part = 0; part < parts; part++)
#define EACH_ROW for (long row = part * rows / parts; row < (part + 1) * rows / parts; row++)
#define EACH_CHANNEL _Pragma("omp simd") for (long c = 0; c < channels; c++)

/* Of the four pixels that a row is made of, the first one's row before pooling. */
static inline long pixel(long row, long width) { return 4 * row - 2 * (row % width); }

static inline int higher(float value, float best) { return value > best || value != value; }

static inline float relu(float x) { return x <= 0 ? 0 : x; } /* NaN stays NaN */

/* The gradient of what went into ReLU. */
static inline float passed(float normalised, float gradient) { return normalised <= 0 ? 0 : gradient; }

#define SIZES long rows, long width, long channels, long parts

/* `pooled`: the maxima of four pixels; `codes`: which of the four each one is, 0 to 3: the first of equal ones or the last NaN, as torch
   chooses. */
void max_pool(const element *restrict x, element *restrict pooled, uint8_t *restrict codes, SIZES) {
    EACH_PART EACH_ROW {
        const element *top = x + pixel(row, width) * channels, *bottom = top + 2 * width * channels;
        element *out = pooled + row * channels;
        uint8_t *code = codes + row * channels;
        EACH_CHANNEL {
            float best = get(top[c]), value = get(top[channels + c]);
            int which = 0;
            if (higher(value, best)) best = value, which = 1;
            value = get(bottom[c]);
            if (higher(value, best)) best = value, which = 2;
            value = get(bottom[channels + c]);
            if (higher(value, best)) best = value, which = 3;
            out[c] = put(best), code[c] = which;
        }
    }
}

/* `out`: the gradient of what `max_pool` got. */
void max_unpool(const element *restrict gradient, const uint8_t *restrict codes, element *restrict out, SIZES) {
    EACH_PART EACH_ROW {
        const element *from = gradient + row * channels;
        const uint8_t *code = codes + row * channels;
        element *top = out + pixel(row, width) * channels, *bottom = top + 2 * width * channels;
        EACH_CHANNEL {
            top[c] = code[c] == 0 ? from[c] : 0;
            top[channels + c] = code[c] == 1 ? from[c] : 0;
            bottom[c] = code[c] == 2 ? from[c] : 0;
            bottom[channels + c] = code[c] == 3 ? from[c] : 0;
        }
    }
}

/* `sums`, (2, parts, channels): of x - about, and of its square. */
void sum_activations(const element *restrict x, const float *restrict about, float *restrict sums, SIZES) {
    EACH_PART {
        float first[channels], second[channels];
        EACH_CHANNEL first[c] = second[c] = 0;
        EACH_ROW {
            const element *from = x + row * channels;
            EACH_CHANNEL {
                float value = get(from[c]) - about[c];
                first[c] += value, second[c] += value * value;
            }
        }
        EACH_CHANNEL sums[part * channels + c] = first[c], sums[(parts + part) * channels + c] = second[c];
    }
}

/* `out`: ReLU of (x - mean) * scale + shift, plus a residual if there is one: rounded before it is added, as torch does. */
void normalise(const element *restrict x, const element *restrict residual, const float *restrict mean, const float *restrict scale,
               const float *restrict shift, element *restrict out, SIZES) {
    EACH_PART EACH_ROW {
        const element *from = x + row * channels, *added = residual + row * channels;
        element *to = out + row * channels;
        if (residual)
            EACH_CHANNEL to[c] = put(get(put(relu((get(from[c]) - mean[c]) * scale[c] + shift[c]))) + get(added[c]));
        else
            EACH_CHANNEL to[c] = put(relu((get(from[c]) - mean[c]) * scale[c] + shift[c]));
    }
}

/* `sums`, (2, parts, channels): of the gradient of what went into ReLU, and of its product with x - mean. */
void sum_gradients(const element *restrict x, const element *restrict gradient, const float *restrict mean, const float *restrict scale,
                   const float *restrict shift, float *restrict sums, SIZES) {
    EACH_PART {
        float first[channels], second[channels];
        EACH_CHANNEL first[c] = second[c] = 0;
        EACH_ROW {
            const element *from = x + row * channels, *given = gradient + row * channels;
            EACH_CHANNEL {
                float centred = get(from[c]) - mean[c], g = passed(centred * scale[c] + shift[c], get(given[c]));
                first[c] += g, second[c] += g * centred;
            }
        }
        EACH_CHANNEL sums[part * channels + c] = first[c], sums[(parts + part) * channels + c] = second[c];
    }
}

/* `out`: the gradient of x. Of the gradient of what went into ReLU it leaves out what goes along 1, `level`, and along x - mean, `slope`,
   and scales the rest. */
void input_gradient(const element *restrict x, const element *restrict gradient, const float *restrict mean, const float *restrict scale,
                    const float *restrict shift, const float *restrict level, const float *restrict slope, element *restrict out, SIZES) {
    EACH_PART EACH_ROW {
        const element *from = x + row * channels, *given = gradient + row * channels;
        element *to = out + row * channels;
        EACH_CHANNEL {
            float centred = get(from[c]) - mean[c], g = passed(centred * scale[c] + shift[c], get(given[c]));
            to[c] = put(scale[c] * (g - level[c] - slope[c] * centred));
        }
    }
}
