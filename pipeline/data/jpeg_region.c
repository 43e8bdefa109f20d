/* A region of a JPEG, decoded without the pixels around it: libjpeg-turbo's crop and skip, at 8/8, 4/8, 2/8 or 1/8.
 *
 * Of a JPEG only the entropy code must be read from its beginning; inverse transform, upsampling and colour conversion
 * are needed for the region alone, and rows below it are not read at all. Bit for bit what decoding the whole image at
 * the same scale and cropping gives: a region is decoded with one block more at either side, since chroma upsampling
 * looks at its neighbours (tests/data/test_decode.py). Other eighths lose the SIMD transform and are slower than none.
 *
 * decode(payload, left, top, right, bottom, denominator) -> (bytearray, first column, columns)
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <setjmp.h>
#include <stdio.h>
#include <jpeglib.h>

#define ROWS 16

struct errors {
    struct jpeg_error_mgr manager;
    jmp_buf jump;
};

static void leave(j_common_ptr info) { longjmp(((struct errors *)info->err)->jump, 1); }

static void count(j_common_ptr info, int level) {
    if (level < 0) info->err->num_warnings++; /* damaged data: the caller decides with another decoder */
}

static void say_nothing(j_common_ptr info) { (void)info; }

/* Rows of the region, one after another. Leaves by longjmp on damage: touches no Python object. */
static void read_rows(struct jpeg_decompress_struct *info, JDIMENSION top, JDIMENSION rows, JSAMPLE *pixels,
                      size_t stride) {
    JSAMPROW pointers[ROWS];
    JDIMENSION done = 0;
    if (top) jpeg_skip_scanlines(info, top);
    while (done < rows) {
        JDIMENSION wanted = rows - done < ROWS ? rows - done : ROWS;
        for (JDIMENSION i = 0; i < wanted; i++) pointers[i] = pixels + (done + i) * stride;
        done += jpeg_read_scanlines(info, pointers, wanted);
    }
}

static PyObject *decode(PyObject *self, PyObject *arguments) {
    Py_buffer payload;
    int left, top, right, bottom, denominator;
    struct jpeg_decompress_struct info;
    struct errors errors;
    char message[JMSG_LENGTH_MAX] = "";
    PyObject *volatile pixels = NULL;
    PyThreadState *volatile thread = NULL;
    volatile JDIMENSION first = 0, columns = 0;

    (void)self;
    if (!PyArg_ParseTuple(arguments, "y*iiiii", &payload, &left, &top, &right, &bottom, &denominator)) return NULL;
    if (denominator != 1 && denominator != 2 && denominator != 4 && denominator != 8) {
        PyBuffer_Release(&payload);
        return PyErr_Format(PyExc_ValueError, "1/%d is no scale of libjpeg; 1, 1/2, 1/4 and 1/8 are", denominator);
    }

    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = leave;
    errors.manager.emit_message = count;
    errors.manager.output_message = say_nothing;
    jpeg_create_decompress(&info);
    if (setjmp(errors.jump)) {
        if (thread) PyEval_RestoreThread(thread);
        errors.manager.format_message((j_common_ptr)&info, message);
        PyErr_SetString(PyExc_ValueError, message);
        goto failed;
    }
    jpeg_mem_src(&info, payload.buf, (unsigned long)payload.len);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = JCS_RGB;
    info.scale_num = 1;
    info.scale_denom = (unsigned int)denominator;
    jpeg_calc_output_dimensions(&info);
    if (left < 0 || top < 0 || left >= right || top >= bottom || right > (int)info.output_width ||
        bottom > (int)info.output_height) {
        PyErr_Format(PyExc_ValueError, "region %d, %d, %d, %d lies outside the %u x %u pixels at 1/%d", left, top, right,
                     bottom, info.output_width, info.output_height, denominator);
        goto failed;
    }
    int margin = info.max_h_samp_factor * DCTSIZE;
    JDIMENSION end = (JDIMENSION)(right + margin) < info.output_width ? (JDIMENSION)(right + margin) : info.output_width;
    JDIMENSION offset = left > margin ? (JDIMENSION)(left - margin) : 0, width = end - offset;
    thread = PyEval_SaveThread();
    jpeg_start_decompress(&info);
    jpeg_crop_scanline(&info, &offset, &width); /* moves offset to the left, to the edge of a block */
    PyEval_RestoreThread(thread);
    thread = NULL;
    first = offset;
    columns = width;
    pixels = PyByteArray_FromStringAndSize(NULL, (Py_ssize_t)width * 3 * (bottom - top));
    if (!pixels) goto failed;
    JSAMPLE *begin = (JSAMPLE *)PyByteArray_AS_STRING(pixels);
    thread = PyEval_SaveThread();
    read_rows(&info, (JDIMENSION)top, (JDIMENSION)(bottom - top), begin, (size_t)width * 3);
    PyEval_RestoreThread(thread);
    thread = NULL;
    if (errors.manager.num_warnings) {
        PyErr_SetString(PyExc_ValueError, "damaged JPEG data");
        goto failed;
    }
    jpeg_destroy_decompress(&info); /* without finishing: what lies below the region is not read */
    PyBuffer_Release(&payload);
    return Py_BuildValue("(NII)", pixels, (unsigned int)first, (unsigned int)columns);

failed:
    jpeg_destroy_decompress(&info);
    PyBuffer_Release(&payload);
    Py_XDECREF(pixels);
    return NULL;
}

static PyObject *read_entropy(PyObject *self, PyObject *argument) {
    Py_buffer payload;
    struct jpeg_decompress_struct info;
    struct errors errors;
    (void)self;
    if (PyObject_GetBuffer(argument, &payload, PyBUF_SIMPLE)) return NULL;
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = leave;
    errors.manager.emit_message = count;
    errors.manager.output_message = say_nothing;
    jpeg_create_decompress(&info);
    volatile int whole = 0;
    if (!setjmp(errors.jump)) {
        jpeg_mem_src(&info, payload.buf, (unsigned long)payload.len);
        jpeg_read_header(&info, TRUE);
        jpeg_read_coefficients(&info);
        whole = 1;
    }
    jpeg_destroy_decompress(&info);
    PyBuffer_Release(&payload);
    if (!whole) return PyErr_Format(PyExc_ValueError, "damaged JPEG data");
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"decode", decode, METH_VARARGS, "Pixels of a region: (bytearray, first column, columns). Raises ValueError."},
    {"read_entropy", read_entropy, METH_O, "Read the entropy code alone: the floor that any decoder stands on."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "jpeg_region", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_jpeg_region(void) { return PyModule_Create(&module); }
