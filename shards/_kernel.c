/* Crop + antialiased resize + flip of 8-bit RGB, straight into the planes of a batch.
 *
 * The filter is the one of Pillow and of torch's `interpolate(antialias=True)`: a triangle (bilinear) or Keys' cubic
 * with a = -0.5 (bicubic), stretched by the scale when the picture shrinks, its taps cut at the box and normalised. As
 * in torch, a pass along the rows comes first, what lies between is cut to [0, 255], and a pass down the columns
 * follows. Both are written as the same sum over lines,
 *
 *     out[i] = sum over k of weight[k] * line[k][i],
 *
 * where i runs over neighbours in memory, so that the compiler, or the AVX2 code below, handles 16 of them at a time.
 * For the first pass a stripe of 16 rows is transposed, so that neighbours in memory are rows, and its result is
 * transposed back. The second pass follows it closely: only the rows that it still needs are kept, in a ring.
 *
 * Fixed point: weights have 14 bits after the point, what lies between the passes has 6. All arithmetic is on integers:
 * every machine gives the same bytes.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAVE_AVX2 1
#endif

enum { STRIPE = 16, WEIGHT_BITS = 14, BETWEEN_BITS = 6, CHANNELS = 3, PLAN = 9, MOST = 1 << 28 };

/* The taps of every output position along one axis. Taps come in pairs; an odd one is followed by weight 0. */
typedef struct {
    int pairs;        /* of every position */
    int32_t *start;   /* [size], position of the first tap within the box */
    int16_t *weights; /* [size, 2 * pairs] */
} Taps;

static double bilinear(double x) {
    x = fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

static double bicubic(double x) {
    const double a = -0.5;
    x = fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
    return 0.0;
}

/* `extent` pixels from `start` on, which lie within `length` whole ones, are resized to `resized`, of which `size` are
 * kept from `offset` on. 0 when there is no memory. */
static int make_taps(Taps *taps, double start, double extent, int length, int resized, int offset, int size,
                     int cubic) {
    const double scale = extent / resized, stretch = scale > 1.0 ? scale : 1.0;
    const double support = (cubic ? 2.0 : 1.0) * stretch;
    const int most = (int)ceil(support) * 2 + 1;
    taps->pairs = (most + 1) / 2;
    taps->start = malloc(sizeof(int32_t) * size);
    taps->weights = calloc((size_t)size * taps->pairs * 2, sizeof(int16_t));
    double *exact = malloc(sizeof(double) * (most + 1));
    if (!taps->start || !taps->weights || !exact) {
        free(exact);
        return 0;
    }
    int longest = 1;
    for (int i = 0; i < size; i++) {
        const double centre = start + (offset + i + 0.5) * scale;
        int first = (int)(centre - support + 0.5), past = (int)(centre + support + 0.5);
        if (first < 0) first = 0;
        if (past > length) past = length;
        if (past - first > most) past = first + most;
        double sum = 0.0;
        for (int k = first; k < past; k++) {
            const double x = (k - centre + 0.5) / stretch;
            sum += exact[k - first] = cubic ? bicubic(x) : bilinear(x);
        }
        /* The running sum is rounded, so that the weights sum to 1 exactly, however many there are: an even picture
           stays as it is. */
        int16_t *weights = taps->weights + (size_t)i * taps->pairs * 2;
        double running = 0.0;
        int given = 0;
        for (int k = 0; k < past - first; k++) {
            running += exact[k] / sum;
            const int rounded = (int)lrint(running * (1 << WEIGHT_BITS));
            weights[k] = (int16_t)(rounded - given);
            given = rounded;
        }
        taps->start[i] = first;
        if (past - first > longest) longest = past - first;
    }
    free(exact);
    /* Pack the rows to the length that is really used. */
    const int pairs = (longest + 1) / 2;
    for (int i = 0; i < size && pairs < taps->pairs; i++)
        memmove(taps->weights + (size_t)i * pairs * 2, taps->weights + (size_t)i * taps->pairs * 2, (size_t)pairs * 4);
    taps->pairs = pairs < taps->pairs ? pairs : taps->pairs;
    return 1;
}

static void free_taps(Taps *taps) {
    free(taps->start);
    free(taps->weights);
}

static int16_t cut(int32_t value, int bits, int most) {
    value = (value + (1 << (bits - 1))) >> bits;
    return (int16_t)(value < 0 ? 0 : value > most ? most : value);
}

/* The first pass over a stripe: `out` [3, size, STRIPE] words from `in` [columns, STRIPE] bytes, where the three
 * channels of a pixel are three columns. BETWEEN_BITS remain after the point. */
static void pass_along_plain(int16_t *out, const uint8_t *in, const Taps *taps, int size, int flip) {
    for (int x = 0; x < size; x++)
        for (int channel = 0; channel < CHANNELS; channel++) {
            const int16_t *weights = taps->weights + (size_t)x * 2 * taps->pairs;
            const uint8_t *line = in + ((ptrdiff_t)taps->start[x] * CHANNELS + channel) * STRIPE;
            int16_t *to = out + ((ptrdiff_t)channel * size + (flip ? size - 1 - x : x)) * STRIPE;
            int32_t sums[STRIPE] = {0};
            for (int k = 0; k < 2 * taps->pairs; k++, line += CHANNELS * STRIPE)
                for (int i = 0; i < STRIPE; i++) sums[i] += weights[k] * line[i];
            for (int i = 0; i < STRIPE; i++) to[i] = cut(sums[i], WEIGHT_BITS - BETWEEN_BITS, 255 << BETWEEN_BITS);
        }
}

/* out[i] = cut(sum of weights[k] * lines[k][i]) for `count` words from `i` on; whole grey levels remain. */
static void sum_words_plain(uint8_t *out, const int16_t *const *lines, const int16_t *weights, int pairs, int i,
                            int count) {
    for (; i < count; i++) {
        int32_t sum = 0;
        for (int k = 0; k < 2 * pairs; k++) sum += weights[k] * lines[k][i];
        out[i] = (uint8_t)cut(sum, WEIGHT_BITS + BETWEEN_BITS, 255);
    }
}

/* `in` [STRIPE rows of `columns` bytes] → `out` [columns, STRIPE]. */
static void transpose_bytes_plain(uint8_t *out, const uint8_t *const *in, int x, int columns) {
    for (; x < columns; x++)
        for (int y = 0; y < STRIPE; y++) out[x * STRIPE + y] = in[y][x];
}

/* `in` [columns, STRIPE] words → STRIPE rows `out`. */
static void transpose_words_plain(int16_t *const *out, const int16_t *in, int x, int columns) {
    for (; x < columns; x++)
        for (int y = 0; y < STRIPE; y++) out[y][x] = in[x * STRIPE + y];
}

#ifdef HAVE_AVX2
#define AVX2 __attribute__((target("avx2")))

/* Two taps at a time: `madd` multiplies 16-bit neighbours and adds the two products to one 32-bit sum. */
AVX2 static inline __m256i pair_of(const int16_t *weights) {
    int32_t both;
    memcpy(&both, weights, 4);
    return _mm256_set1_epi32(both);
}

AVX2 static inline __m256i two_taps(__m256i sum, __m128i bytes, __m256i weight) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(bytes), weight));
}

AVX2 static void pass_along_avx2(int16_t *out, const uint8_t *in, const Taps *taps, int size, int flip) {
    const int bits = WEIGHT_BITS - BETWEEN_BITS;
    const __m256i most = _mm256_set1_epi16(255 << BETWEEN_BITS);
    for (int x = 0; x < size; x++) {
        const int16_t *weights = taps->weights + (size_t)x * 2 * taps->pairs;
        const __m128i *line = (const __m128i *)(in + (ptrdiff_t)taps->start[x] * CHANNELS * STRIPE);
        int16_t *to = out + (ptrdiff_t)(flip ? size - 1 - x : x) * STRIPE;
        __m256i low[CHANNELS], high[CHANNELS]; /* rows 0-7 and 8-15 */
        for (int channel = 0; channel < CHANNELS; channel++)
            low[channel] = high[channel] = _mm256_set1_epi32(1 << (bits - 1));
        for (int k = 0; k < taps->pairs; k++, line += 2 * CHANNELS) {
            const __m256i weight = pair_of(weights + 2 * k);
            for (int channel = 0; channel < CHANNELS; channel++) {
                const __m128i a = _mm_loadu_si128(line + channel), b = _mm_loadu_si128(line + CHANNELS + channel);
                low[channel] = two_taps(low[channel], _mm_unpacklo_epi8(a, b), weight);
                high[channel] = two_taps(high[channel], _mm_unpackhi_epi8(a, b), weight);
            }
        }
        for (int channel = 0; channel < CHANNELS; channel++, to += (ptrdiff_t)size * STRIPE) {
            __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(low[channel], bits),
                                               _mm256_srai_epi32(high[channel], bits));
            words = _mm256_permute4x64_epi64(words, 0xD8); /* 0-3 8-11 4-7 12-15 → in order */
            words = _mm256_max_epi16(_mm256_setzero_si256(), _mm256_min_epi16(words, most));
            _mm256_storeu_si256((__m256i *)to, words);
        }
    }
}

AVX2 static void sum_words_avx2(uint8_t *out, const int16_t *const *lines, const int16_t *weights, int pairs,
                                int count) {
    const int bits = WEIGHT_BITS + BETWEEN_BITS;
    int i = 0;
    for (; i + STRIPE <= count; i += STRIPE) {
        __m256i a = _mm256_set1_epi32(1 << (bits - 1)), b = a;
        for (int k = 0; k < pairs; k++) {
            const __m256i weight = pair_of(weights + 2 * k);
            const __m256i x = _mm256_loadu_si256((const __m256i *)(lines[2 * k] + i));
            const __m256i y = _mm256_loadu_si256((const __m256i *)(lines[2 * k + 1] + i));
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_unpacklo_epi16(x, y), weight));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_unpackhi_epi16(x, y), weight));
        }
        const __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(a, bits), _mm256_srai_epi32(b, bits)); /* in order */
        const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
        _mm_storeu_si128((__m128i *)(out + i), _mm_packus_epi16(low, high));
    }
    sum_words_plain(out, lines, weights, pairs, i, count);
}

AVX2 static void transpose_bytes_avx2(uint8_t *out, const uint8_t *const *in, int columns) {
    int x = 0;
    for (; x + 16 <= columns; x += 16) {
        __m128i r[16], s[16];
        for (int j = 0; j < 16; j++) r[j] = _mm_loadu_si128((const __m128i *)(in[j] + x));
        for (int round = 0; round < 4; round++) { /* of interleaving row j with row j + 8: rows become columns */
            for (int j = 0; j < 8; j++) {
                s[2 * j] = _mm_unpacklo_epi8(r[j], r[j + 8]);
                s[2 * j + 1] = _mm_unpackhi_epi8(r[j], r[j + 8]);
            }
            memcpy(r, s, sizeof r);
        }
        for (int j = 0; j < 16; j++) _mm_storeu_si128((__m128i *)(out + (x + j) * STRIPE), r[j]);
    }
    transpose_bytes_plain(out, in, x, columns);
}

AVX2 static void transpose_words_avx2(int16_t *const *out, const int16_t *in, int columns) {
    int x = 0;
    for (; x + 8 <= columns; x += 8)
        for (int y = 0; y < STRIPE; y += 8) {
            __m128i r[8], s[8];
            for (int j = 0; j < 8; j++) r[j] = _mm_loadu_si128((const __m128i *)(in + (x + j) * STRIPE + y));
            for (int round = 0; round < 3; round++) { /* as above, of row j with row j + 4 */
                for (int j = 0; j < 4; j++) {
                    s[2 * j] = _mm_unpacklo_epi16(r[j], r[j + 4]);
                    s[2 * j + 1] = _mm_unpackhi_epi16(r[j], r[j + 4]);
                }
                memcpy(r, s, sizeof r);
            }
            for (int j = 0; j < 8; j++) _mm_storeu_si128((__m128i *)(out[y + j] + x), r[j]);
        }
    transpose_words_plain(out, in, x, columns);
}
#endif

static void pass_along(int fast, int16_t *out, const uint8_t *in, const Taps *taps, int size, int flip) {
#ifdef HAVE_AVX2
    if (fast) {
        pass_along_avx2(out, in, taps, size, flip);
        return;
    }
#endif
    (void)fast;
    pass_along_plain(out, in, taps, size, flip);
}

static void sum_words(int fast, uint8_t *out, const int16_t *const *lines, const int16_t *weights, int pairs,
                      int count) {
#ifdef HAVE_AVX2
    if (fast) {
        sum_words_avx2(out, lines, weights, pairs, count);
        return;
    }
#endif
    (void)fast;
    sum_words_plain(out, lines, weights, pairs, 0, count);
}

static void transpose_bytes(int fast, uint8_t *out, const uint8_t *const *in, int columns) {
#ifdef HAVE_AVX2
    if (fast) {
        transpose_bytes_avx2(out, in, columns);
        return;
    }
#endif
    (void)fast;
    transpose_bytes_plain(out, in, 0, columns);
}

static void transpose_words(int fast, int16_t *const *out, const int16_t *in, int columns) {
#ifdef HAVE_AVX2
    if (fast) {
        transpose_words_avx2(out, in, columns);
        return;
    }
#endif
    (void)fast;
    transpose_words_plain(out, in, 0, columns);
}

/* A box may begin and end within a pixel: of a picture decoded at half its size, say. */
typedef struct {
    double top, left, height, width, resized_height, resized_width, offset_y, offset_x, flip;
} Plan;

/* One view [3, size, size] of a picture whose rows are `step` bytes apart; 0 when there is no memory. */
static int resize(uint8_t *out, const uint8_t *picture, ptrdiff_t step, const Plan *p, int size, int cubic, int fast) {
    Taps down = {0}, along = {0};
    const int top = (int)floor(p->top), left = (int)floor(p->left); /* the whole pixels that the box touches */
    const int height = (int)ceil(p->top + p->height) - top, width = (int)ceil(p->left + p->width) - left;
    const uint8_t *box = picture + top * step + (ptrdiff_t)left * CHANNELS;
    const int rows = (int)p->resized_height, columns = (int)p->resized_width;
    int done = make_taps(&down, p->top - top, p->height, height, rows, (int)p->offset_y, size, cubic) &&
               make_taps(&along, p->left - left, p->width, width, columns, (int)p->offset_x, size, cubic);
    const int ring = 2 * down.pairs + 2 * STRIPE; /* rows that the second pass may still need, and a new stripe */
    /* At the right border taps of weight 0 reach past the box: room for them, with something in it. */
    uint8_t *turned = calloc(((size_t)width + 2 * along.pairs) * CHANNELS, STRIPE);
    int16_t *stripe = malloc(sizeof(int16_t) * CHANNELS * size * STRIPE);
    int16_t *between = malloc(sizeof(int16_t) * ring * CHANNELS * size); /* [ring, 3, size] */
    const int16_t **lines = malloc(sizeof(*lines) * 2 * (down.pairs + 1));
    done = done && turned && stripe && between && lines;
    int ready = done ? down.start[0] : 0; /* rows of the box before this one have been through the first pass */
    for (int y = 0; done && y < size; y++) {
        int past = down.start[y] + 2 * down.pairs; /* taps past the bottom have weight 0 and may see any row */
        if (past > height) past = height;
        for (; ready < past; ready += STRIPE) {
            const uint8_t *in[STRIPE];
            int16_t *to[STRIPE];
            for (int j = 0; j < STRIPE; j++) in[j] = box + (ready + j < height ? ready + j : height - 1) * step;
            transpose_bytes(fast, turned, in, width * CHANNELS);
            pass_along(fast, stripe, turned, &along, size, p->flip != 0);
            for (int channel = 0; channel < CHANNELS; channel++) {
                for (int j = 0; j < STRIPE; j++)
                    to[j] = between + ((size_t)((ready + j) % ring) * CHANNELS + channel) * size;
                transpose_words(fast, to, stripe + (ptrdiff_t)channel * size * STRIPE, size);
            }
        }
        for (int channel = 0; channel < CHANNELS; channel++) {
            for (int k = 0; k < 2 * down.pairs; k++) {
                const int row = down.start[y] + k < past ? down.start[y] + k : past - 1;
                lines[k] = between + ((size_t)(row % ring) * CHANNELS + channel) * size;
            }
            sum_words(fast, out + ((size_t)channel * size + y) * size, lines,
                      down.weights + (size_t)y * 2 * down.pairs, down.pairs, size);
        }
    }
    free(lines);
    free(between);
    free(stripe);
    free(turned);
    free_taps(&down);
    free_taps(&along);
    return done;
}

static int has_avx2(void) {
#ifdef HAVE_AVX2
    return __builtin_cpu_supports("avx2") != 0;
#else
    return 0;
#endif
}

static int fits(const Plan *p, Py_ssize_t height, Py_ssize_t width, Py_ssize_t size) { /* false for NaN too */
    return p->top >= 0 && p->left >= 0 && p->height > 0 && p->width > 0 && p->top + p->height <= height &&
           p->left + p->width <= width && p->resized_height <= MOST && p->resized_width <= MOST && p->offset_y >= 0 &&
           p->offset_x >= 0 && p->offset_y + size <= p->resized_height && p->offset_x + size <= p->resized_width;
}

PyDoc_STRVAR(resize_into_doc,
             "resize_into(out, picture, plans, bicubic, portable=False)\n--\n\n"
             "Cut the views `plans` (float64 [n, 9]: top, left, height, width of the box; height and width that it is\n"
             "resized to; top and left of what is kept of that; flip) from `picture` (uint8 [h, w, 3], pixels\n"
             "contiguous) and write them to `out` (uint8 [n, 3, size, size], planes contiguous).\n"
             "`portable` takes the code that runs without AVX2; it writes the same bytes.\n\n"
             "Raises ValueError when shapes or boxes do not fit, MemoryError.");

static PyObject *resize_into(PyObject *module, PyObject *args) {
    PyObject *objects[3];
    Py_buffer b[3];
    int cubic, portable = 0, held = 0, done = 1;
    const int flags[3] = {PyBUF_STRIDES | PyBUF_WRITABLE, PyBUF_STRIDES, PyBUF_C_CONTIGUOUS};
    if (!PyArg_ParseTuple(args, "OOOp|p", &objects[0], &objects[1], &objects[2], &cubic, &portable)) return NULL;
    for (; held < 3; held++)
        if (PyObject_GetBuffer(objects[held], &b[held], flags[held]) < 0) goto release;
    const Py_buffer *out = &b[0], *picture = &b[1], *plans = &b[2];
    int sound = out->ndim == 4 && out->itemsize == 1 && picture->ndim == 3 && picture->itemsize == 1 &&
                plans->ndim == 2 && plans->itemsize == sizeof(double) && plans->shape[1] == PLAN;
    sound = sound && out->shape[0] == plans->shape[0] && out->shape[1] == CHANNELS && out->shape[2] == out->shape[3] &&
            out->strides[3] == 1 && out->strides[2] == out->shape[3] &&
            out->strides[1] == out->shape[2] * out->shape[3] && out->shape[3] >= 1 && out->shape[3] <= 1 << 15;
    sound = sound && picture->shape[2] == CHANNELS && picture->strides[2] == 1 && picture->strides[1] == CHANNELS &&
            picture->shape[0] <= MOST && picture->shape[1] <= MOST;
    for (Py_ssize_t i = 0; sound && i < plans->shape[0]; i++)
        sound = fits((const Plan *)plans->buf + i, picture->shape[0], picture->shape[1], out->shape[3]);
    if (!sound) {
        PyErr_SetString(PyExc_ValueError, "resize_into: shapes, strides or boxes do not fit");
        goto release;
    }
    const int fast = !portable && has_avx2();
    Py_BEGIN_ALLOW_THREADS;
    for (Py_ssize_t i = 0; done && i < plans->shape[0]; i++)
        done = resize((uint8_t *)out->buf + i * out->strides[0], picture->buf, picture->strides[0],
                      (const Plan *)plans->buf + i, (int)out->shape[3], cubic, fast);
    Py_END_ALLOW_THREADS;
    if (!done) PyErr_NoMemory();
release:
    while (held--) PyBuffer_Release(&b[held]);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"resize_into", resize_into, METH_VARARGS, resize_into_doc}, {NULL, NULL, 0, NULL}};

static PyModuleDef_Slot slots[] = {{0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "shards._kernel", "Crop, antialiased resize and flip of 8-bit RGB.", 0, methods, slots,
    NULL,                  NULL,             NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
