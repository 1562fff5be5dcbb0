/* Many small files looked at, and read into one buffer with the crc32 of each: what Python spends a third of a
   conversion on.

   shards/sources.py does the same without this file; a test compares them. The crc32 is zlib's, by carry-less
   multiplication (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ", Intel 2009), five times
   as fast as a table; where a processor has none, importing this module fails, and zlib is called. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define POLYNOMIAL 0xEDB88320u /* of CRC-32, its bits reflected */
#define LANES 4

static uint32_t table[256];

static void make_table(void) {
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ POLYNOMIAL : value >> 1;
        table[byte] = value;
    }
}

static uint32_t by_table(uint32_t state, const uint8_t *data, size_t size) {
    while (size--) state = state >> 8 ^ table[(state ^ *data++) & 255];
    return state;
}

/* `x` moved on by as many bits as the two factors stand for: x^(n+32) and x^(n-32) modulo the polynomial, reflected,
   times x. The sum with what lies there has the same remainder. */
__attribute__((target("pclmul,sse4.1"))) static inline __m128i fold(__m128i x, __m128i factors, __m128i there) {
    const __m128i low = _mm_clmulepi64_si128(x, factors, 0x00), high = _mm_clmulepi64_si128(x, factors, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

__attribute__((target("pclmul,sse4.1"))) static uint32_t crc32_of(const uint8_t *data, size_t size) {
    uint32_t state = 0xFFFFFFFFu;
    if (size >= 16 * LANES) {
        const __m128i by_lanes = _mm_set_epi64x(0x1c6e41596, 0x154442bd4); /* n = 512 */
        const __m128i by_one = _mm_set_epi64x(0x0ccaa009e, 0x1751997d0);   /* n = 128 */
        __m128i x[LANES];
        for (int i = 0; i < LANES; i++) x[i] = _mm_loadu_si128((const __m128i *)data + i);
        x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)state));
        for (data += 16 * LANES, size -= 16 * LANES; size >= 16 * LANES; data += 16 * LANES, size -= 16 * LANES)
            for (int i = 0; i < LANES; i++) x[i] = fold(x[i], by_lanes, _mm_loadu_si128((const __m128i *)data + i));
        for (int i = 1; i < LANES; i++) x[0] = fold(x[0], by_one, x[i]);
        for (; size >= 16; data += 16, size -= 16) x[0] = fold(x[0], by_one, _mm_loadu_si128((const __m128i *)data));
        uint8_t rest[16];
        _mm_storeu_si128((__m128i *)rest, x[0]);
        state = by_table(0, rest, sizeof rest);
    }
    return ~by_table(state, data, size);
}

static int supported(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}
#else
static void make_table(void) {}
static uint32_t crc32_of(const uint8_t *data, size_t size) { return (void)data, (uint32_t)size; }
static int supported(void) { return 0; }
#endif

/* Whether a file was read and has the size that it should have; one more byte of it would land in `spare`. */
static int read_file(int folder, const char *path, uint8_t *into, size_t size) {
    uint8_t spare;
    struct iovec parts[2] = {{into, size}, {&spare, 1}};
    const int file = openat(folder, path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    if (file < 0) return 0;
    const ssize_t count = readv(file, parts, 2);
    close(file);
    return size > 0 && count == (ssize_t)size;
}

/* Whether these bytes begin like nearly all JPEGs, up to a frame header of at most `most` pixels. What is 0 here is for
   shards/image_header.py to judge; what is 1 it would accept. */
static int ordinary_jpeg(const uint8_t *data, size_t size, uint64_t most) {
    if (size < 4 || data[0] != 0xFF || data[1] != 0xD8) return 0;
    for (size_t at = 2; at + 9 <= size;) {
        const uint8_t marker = data[at + 1];
        const size_t length = (size_t)data[at + 2] << 8 | data[at + 3];
        const int segment = marker >= 0xC0 && marker != 0xFF && !(marker >= 0xD0 && marker <= 0xDA);
        if (data[at] != 0xFF || !segment || length < 2) return 0;
        if (marker <= 0xCF && marker != 0xC4 && marker != 0xC8 && marker != 0xCC) {
            const uint64_t pixels = (uint64_t)(data[at + 5] << 8 | data[at + 6]) * (data[at + 7] << 8 | data[at + 8]);
            return data[at + 4] == 8 && pixels > 0 && pixels <= most && at + 10 <= size;
        }
        at += 2 + length;
    }
    return 0;
}

PyDoc_STRVAR(read_files_doc,
             "read_files(folder, paths, buffer, begins, sizes, crc32, ordinary, max_pixels) -> int\n\n"
             "Read files, paths relative to a folder (int, its descriptor), to `buffer` at `begins` (int64 [n]). Writes\n"
             "the crc32 of each (uint32 [n]), and whether it is certainly a JPEG with a sound header of at most\n"
             "`max_pixels` (bool [n]). Stops before the first that is not one of `sizes` (int64 [n]) bytes or cannot be\n"
             "read; gives the number of those before it.");

static PyObject *read_files(PyObject *self, PyObject *args) {
    int folder, held = 0;
    long long most;
    PyObject *paths, *objects[5], *done = NULL;
    Py_buffer b[5];
    const int flags[5] = {PyBUF_WRITABLE, PyBUF_SIMPLE, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBUF_WRITABLE};
    if (!PyArg_ParseTuple(args, "iO!OOOOOL", &folder, &PyList_Type, &paths, &objects[0], &objects[1], &objects[2],
                          &objects[3], &objects[4], &most))
        return NULL;
    const Py_ssize_t n = PyList_GET_SIZE(paths);
    PyObject **names = PyMem_Calloc(n ? n : 1, sizeof *names);
    if (!names) return PyErr_NoMemory();
    for (; held < 5; held++)
        if (PyObject_GetBuffer(objects[held], &b[held], flags[held]) < 0) goto release;
    for (Py_ssize_t i = 0; i < n; i++)
        if (!PyUnicode_FSConverter(PyList_GET_ITEM(paths, i), &names[i])) goto release;
    const int64_t *begins = b[1].buf, *sizes = b[2].buf;
    uint32_t *crc32 = b[3].buf;
    uint8_t *ordinary = b[4].buf;
    int sound = b[1].len == n * 8 && b[2].len == n * 8 && b[3].len == n * 4 && b[4].len == n && most >= 0;
    for (Py_ssize_t i = 0; sound && i < n; i++)
        sound = begins[i] >= 0 && sizes[i] >= 0 && sizes[i] <= b[0].len && begins[i] <= b[0].len - sizes[i];
    if (!sound) {
        PyErr_SetString(PyExc_ValueError, "read_files: lengths or positions do not fit");
        goto release;
    }
    Py_ssize_t i = 0;
    Py_BEGIN_ALLOW_THREADS;
    for (; i < n; i++) {
        uint8_t *into = (uint8_t *)b[0].buf + begins[i];
        if (!read_file(folder, PyBytes_AS_STRING(names[i]), into, (size_t)sizes[i])) break;
        crc32[i] = crc32_of(into, (size_t)sizes[i]);
        ordinary[i] = (uint8_t)ordinary_jpeg(into, (size_t)sizes[i], (uint64_t)most);
    }
    Py_END_ALLOW_THREADS;
    done = PyLong_FromSsize_t(i);
release:
    for (Py_ssize_t j = 0; j < n; j++) Py_XDECREF(names[j]);
    PyMem_Free(names);
    while (held--) PyBuffer_Release(&b[held]);
    return done;
}

PyDoc_STRVAR(look_at_files_doc,
             "look_at_files(folder, names, sizes, times)\n\n"
             "Write the size of each file (int64 [n]; -1 for what is no regular file or cannot be looked at) and the time\n"
             "of its last change in nanoseconds (int64 [n]; 0 for these), following links; names as in `read_files`.");

static PyObject *look_at_files(PyObject *self, PyObject *args) {
    int folder, held = 0;
    PyObject *paths, *objects[2], *done = NULL;
    Py_buffer b[2];
    if (!PyArg_ParseTuple(args, "iO!OO", &folder, &PyList_Type, &paths, &objects[0], &objects[1])) return NULL;
    const Py_ssize_t n = PyList_GET_SIZE(paths);
    for (; held < 2; held++)
        if (PyObject_GetBuffer(objects[held], &b[held], PyBUF_WRITABLE) < 0) goto release;
    if (b[0].len != n * 8 || b[1].len != n * 8) {
        PyErr_SetString(PyExc_ValueError, "look_at_files: lengths do not fit");
        goto release;
    }
    int64_t *sizes = b[0].buf, *times = b[1].buf;
    for (Py_ssize_t i = 0; i < n; i++) {
        PyObject *name;
        struct stat facts;
        if (!PyUnicode_FSConverter(PyList_GET_ITEM(paths, i), &name)) goto release;
        const int regular = !fstatat(folder, PyBytes_AS_STRING(name), &facts, 0) && S_ISREG(facts.st_mode);
        Py_DECREF(name);
        sizes[i] = regular ? (int64_t)facts.st_size : -1;
        times[i] = regular ? (int64_t)facts.st_mtim.tv_sec * 1000000000 + facts.st_mtim.tv_nsec : 0;
    }
    done = Py_NewRef(Py_None);
release:
    while (held--) PyBuffer_Release(&b[held]);
    return done;
}

static PyMethodDef methods[] = {{"read_files", read_files, METH_VARARGS, read_files_doc},
                                {"look_at_files", look_at_files, METH_VARARGS, look_at_files_doc},
                                {NULL, NULL, 0, NULL}};

static int start(PyObject *module) {
    (void)module;
    make_table();
    if (supported()) return 0;
    PyErr_SetString(PyExc_ImportError, "shards._files: the processor has no carry-less multiplication");
    return -1;
}

static PyModuleDef_Slot slots[] = {{Py_mod_exec, start}, {0, NULL}};
static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "shards._files", "Many small files read into one buffer.", 0, methods, slots, NULL, NULL,
    NULL};

PyMODINIT_FUNC PyInit__files(void) { return PyModuleDef_Init(&definition); }
