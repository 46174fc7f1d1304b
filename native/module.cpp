// The Python module nsds_gguf.quantize._rounding: checks its arguments, chooses the instruction set, releases the GIL.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstring>
#include <initializer_list>
#include <new>

#include "variants.h"

namespace {

struct Variant {
    const char* name;
    Round* round;
    Nearest* nearest;
    bool works;
};

const Variant* variants() {
#if defined(NSDS_X86)
    static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    static const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    static const Variant table[] = {{"avx512", avx512::round, avx512::nearest, has_avx512},
                                    {"avx2", avx2::round, avx2::nearest, has_avx2},
                                    {"plain", plain::round, plain::nearest, true},
                                    {nullptr, nullptr, nullptr, false}};  // best first
#else
    static const Variant table[] = {{"plain", plain::round, plain::nearest, true}, {nullptr, nullptr, nullptr, false}};
#endif
    return table;
}

// The variant of that name, or the best one where the name is empty; null where this processor has none.
const Variant* variant_named(const char* name) {
    for (const Variant* each = variants(); each->name != nullptr; ++each)
        if (each->works && (*name == '\0' || std::strcmp(each->name, name) == 0)) return each;
    return nullptr;
}

// Buffers that are released when they go out of scope.
struct Buffers {
    Py_buffer rows{}, upper{}, variances{}, codes{}, s{}, m{}, d{}, dmin{}, errors{};
    ~Buffers() {
        for (Py_buffer* each : {&rows, &upper, &variances, &codes, &s, &m, &d, &dmin, &errors})
            if (each->obj != nullptr) PyBuffer_Release(each);
    }
};

bool has_items(const Py_buffer& buffer, Py_ssize_t n, Py_ssize_t item) { return buffer.len == n * item; }

float* floats(const Py_buffer& buffer) { return static_cast<float*>(buffer.buf); }

// Round by `upper`, if it is there, else to nearest with `variances` as weights of columns.
PyObject* rounded(Buffers& in, const char* type, int n_descents, const char* name) {
    const Py_ssize_t n = in.variances.len / Py_ssize_t(sizeof(float)), n_rows = in.errors.len / Py_ssize_t(sizeof(double));
    const Py_ssize_t n_scales = in.s.len / Py_ssize_t(sizeof(int16_t)), n_blocks = in.d.len / Py_ssize_t(sizeof(float));
    const bool is_nearest = in.upper.obj == nullptr;
    if (!has_items(in.rows, n_rows * n, 4) || !(is_nearest || has_items(in.upper, n * n, 4)) ||
        !has_items(in.codes, n_rows * n, 1) || in.m.len != in.s.len || in.dmin.len != in.d.len) {
        PyErr_SetString(PyExc_ValueError, "arrays of rows, columns and results have sizes that do not match");
        return nullptr;
    }
    const Variant* variant = variant_named(name);
    if (variant == nullptr) return PyErr_Format(PyExc_ValueError, "no variant %s for this processor", name);
    const Output out{static_cast<uint8_t*>(in.codes.buf), static_cast<int16_t*>(in.s.buf),
                     static_cast<int16_t*>(in.m.buf),     floats(in.d),
                     floats(in.dmin),                     static_cast<double*>(in.errors.buf), n_blocks, n_scales};
    bool known = false, enough = true;
    Py_BEGIN_ALLOW_THREADS;
    try {
        known = is_nearest ? variant->nearest(type, floats(in.rows), int(n_rows), n, floats(in.variances), out)
                           : variant->round(type, floats(in.rows), int(n_rows), n, floats(in.upper), floats(in.variances),
                                            n_descents, out);
    } catch (const std::bad_alloc&) {
        enough = false;
    }
    Py_END_ALLOW_THREADS;
    if (!enough) return PyErr_NoMemory();
    if (!known) return PyErr_Format(PyExc_ValueError, "no such type, or arrays of another number of blocks: %s", type);
    Py_RETURN_NONE;
}

PyObject* round_rows(PyObject*, PyObject* arguments) {
    Buffers in;
    const char *type = nullptr, *name = nullptr;
    int n_descents = 0;
    if (!PyArg_ParseTuple(arguments, "y*y*y*siw*w*w*w*w*w*s", &in.rows, &in.upper, &in.variances, &type, &n_descents,
                          &in.codes, &in.s, &in.m, &in.d, &in.dmin, &in.errors, &name))
        return nullptr;
    return rounded(in, type, n_descents, name);
}

PyObject* nearest_rows(PyObject*, PyObject* arguments) {
    Buffers in;
    const char *type = nullptr, *name = nullptr;
    if (!PyArg_ParseTuple(arguments, "y*y*sw*w*w*w*w*w*s", &in.rows, &in.variances, &type, &in.codes, &in.s, &in.m, &in.d,
                          &in.dmin, &in.errors, &name))
        return nullptr;
    return rounded(in, type, 0, name);
}

PyObject* variant_names(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (const Variant* each = variants(); names != nullptr && each->name != nullptr; ++each) {
        if (!each->works) continue;
        PyObject* name = PyUnicode_FromString(each->name);
        if (name == nullptr || PyList_Append(names, name) != 0) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyMethodDef methods[] = {
    {"round_rows", round_rows, METH_VARARGS, "Round rows by GPTQ; see nsds_gguf/quantize/kernel.py."},
    {"nearest_rows", nearest_rows, METH_VARARGS, "Round rows to nearest; see nsds_gguf/quantize/kernel.py."},
    {"variants", variant_names, METH_NOARGS, "Return the names of the variants that this processor runs, best first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_rounding", "Rounding, compiled.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__rounding() { return PyModule_Create(&module); }
