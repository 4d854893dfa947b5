/* vocab_hf.c - the tokenizer of a Hugging Face folder. */
#include "capture/tokenizer.h"

kv_status kv_tokenizer_open_hf(const char *folder, uint32_t n_vocab, kv_tokenizer **out, kv_error *err)
{
    *out = NULL;
    return kv_fail(err, KV_EUNSUPPORTED,
                   "the vocabulary of '%s' (%u tokens) is in tokenizer.json, which is not read yet", folder, n_vocab);
}
