/* arrays.h - one array out of the containers people have: a .npy file, a member of an .npz file (a zip, stored or
 * deflated), a tensor of a safetensors file.
 *
 * It is named FILE or FILE:NAME; NAME may be left out where the container has one array only. A file that is called
 * that as a whole, colon and all, comes first. Containers are told apart by their first bytes. Sizes are compared with
 * the file before anything is allocated; checksums of zip members are checked. */
#ifndef KV_ARRAYS_H
#define KV_ARRAYS_H

#include "traces/npy.h"

/* Also kind 'B', size 2: bfloat16 (safetensors). KV_EMISSING lists the names that there are. */
kv_status kv_array_load(const char *spec, kv_npy *out, kv_error *err);

#endif
