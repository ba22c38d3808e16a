// What csrc/cpu/python.cpp needs of CPython: functions of its stable ABI, declared here, so that one library serves every version
// and compiles without Python's headers. They are weak: a program without Python may load the library, too, and calls none.
#pragma once

#include <cstddef>

#define RNNFAST_OF_PYTHON extern "C" __attribute__((weak, visibility("default")))

struct PyObject;
using PyCFunction = PyObject* (*)(PyObject*, PyObject*);
struct PyMethodDef {
  const char* name;
  PyCFunction function;
  int flags;
  const char* doc;
};
constexpr int METH_NOARGS = 0x4, METH_O = 0x8, METH_FASTCALL = 0x80, Py_EQ = 2;

RNNFAST_OF_PYTHON PyObject _Py_NoneStruct;
RNNFAST_OF_PYTHON PyObject PyLong_Type;
RNNFAST_OF_PYTHON PyObject *PyExc_Exception, *PyExc_RuntimeError, *PyExc_TypeError;
RNNFAST_OF_PYTHON void Py_IncRef(PyObject*);
RNNFAST_OF_PYTHON void Py_DecRef(PyObject*);
RNNFAST_OF_PYTHON void PyErr_Clear();
RNNFAST_OF_PYTHON int PyErr_ExceptionMatches(PyObject*);
RNNFAST_OF_PYTHON PyObject* PyErr_Occurred();
RNNFAST_OF_PYTHON void PyErr_SetString(PyObject*, const char*);
RNNFAST_OF_PYTHON void* PyEval_SaveThread();
RNNFAST_OF_PYTHON void PyEval_RestoreThread(void*);
RNNFAST_OF_PYTHON PyObject* PyCFunction_NewEx(PyMethodDef*, PyObject* self, PyObject* module);
RNNFAST_OF_PYTHON PyObject* PyObject_CallFunctionObjArgs(PyObject*, ...);
RNNFAST_OF_PYTHON PyObject* PyObject_CallMethodObjArgs(PyObject*, PyObject* name, ...);
RNNFAST_OF_PYTHON PyObject* PyObject_CallObject(PyObject*, PyObject* arguments);
RNNFAST_OF_PYTHON PyObject* PyObject_GetAttr(PyObject*, PyObject* name);
RNNFAST_OF_PYTHON PyObject* PyObject_GetItem(PyObject*, PyObject* key);
RNNFAST_OF_PYTHON int PyObject_IsTrue(PyObject*);
RNNFAST_OF_PYTHON int PyObject_RichCompareBool(PyObject*, PyObject*, int operation);
RNNFAST_OF_PYTHON ptrdiff_t PyObject_Size(PyObject*);
RNNFAST_OF_PYTHON PyObject* PyObject_Type(PyObject*);
RNNFAST_OF_PYTHON PyObject* PyBool_FromLong(long);
RNNFAST_OF_PYTHON char* PyBytes_AsString(PyObject*);
RNNFAST_OF_PYTHON PyObject* PyBytes_FromStringAndSize(const char*, ptrdiff_t);
RNNFAST_OF_PYTHON PyObject* PyLong_FromLongLong(long long);
RNNFAST_OF_PYTHON long long PyLong_AsLongLong(PyObject*);
RNNFAST_OF_PYTHON PyObject* PyList_GetItem(PyObject*, ptrdiff_t);  // borrowed
RNNFAST_OF_PYTHON int PyList_SetItem(PyObject*, ptrdiff_t, PyObject* taken);
RNNFAST_OF_PYTHON PyObject* PyTuple_GetItem(PyObject*, ptrdiff_t);  // borrowed
RNNFAST_OF_PYTHON PyObject* PyTuple_New(ptrdiff_t);
RNNFAST_OF_PYTHON int PyTuple_SetItem(PyObject*, ptrdiff_t, PyObject* taken);
RNNFAST_OF_PYTHON ptrdiff_t PyTuple_Size(PyObject*);
RNNFAST_OF_PYTHON PyObject* PyUnicode_InternFromString(const char*);
