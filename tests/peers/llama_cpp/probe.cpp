// What llama.cpp makes of a GGUF file, for tests/peers/test_llama_cpp.py. Knows llama.h only.
//
//   probe logits MODEL IDS OUT       IDS: int32 tokens; OUT: float32 logits [tokens, vocabulary], computed at once
//   probe quantize MODEL OUT TYPE    TYPE: a number of llama_ftype; 0 decodes to F32
//   probe tokens MODEL TEXT OUT      TEXT: UTF-8; OUT: int32 ids, added tokens recognized, nothing before or after
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

template <typename T> static std::vector<T> read_all(const char * path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    std::vector<T> values(bytes.size() / sizeof(T));
    std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
    return values;
}

template <typename T> static void write_all(const char * path, const T * values, size_t count) {
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char *>(values), count * sizeof(T));
}

static llama_model * load(const char * path, bool vocab_only) {
    llama_model_params params = llama_model_default_params();
    params.vocab_only = vocab_only;
    params.load_mtp = true;  // else its tensors are passed over
    params.use_extra_bufts = false;  // weights as they lie in the file
    llama_model * model = llama_model_load_from_file(path, params);
    if (!model) {
        std::exit(2);
    }
    return model;
}

static int logits(const char * path, const char * ids, const char * out) {
    std::vector<llama_token> tokens = read_all<llama_token>(ids);
    llama_model * model = load(path, false);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = tokens.size();
    params.n_threads = params.n_threads_batch = 2;
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) {
        return 3;
    }
    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); i++) {
        batch.token[i] = tokens[i];
        batch.pos[i] = i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = 1;
    }
    batch.n_tokens = tokens.size();
    if (llama_decode(context, batch)) {
        return 4;
    }
    const size_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
    write_all(out, llama_get_logits(context), tokens.size() * vocabulary);
    return 0;
}

static int quantize(const char * path, const char * out, int type) {
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.ftype = static_cast<llama_ftype>(type);
    params.nthread = 2;
    params.allow_requantize = true;
    return llama_model_quantize(path, out, &params);
}

static int tokens(const char * path, const char * text, const char * out) {
    std::vector<char> bytes = read_all<char>(text);
    const llama_vocab * vocab = llama_model_get_vocab(load(path, true));
    std::vector<llama_token> ids(bytes.size() + 8);
    const int count = llama_tokenize(vocab, bytes.data(), bytes.size(), ids.data(), ids.size(), false, true);
    if (count < 0) {
        return 5;
    }
    write_all(out, ids.data(), count);
    return 0;
}

int main(int argc, char ** argv) {
    const std::string what = argc == 5 ? argv[1] : "";
    llama_backend_init();
    if (what == "logits") {
        return logits(argv[2], argv[3], argv[4]);
    }
    if (what == "quantize") {
        return quantize(argv[2], argv[3], std::atoi(argv[4]));
    }
    if (what == "tokens") {
        return tokens(argv[2], argv[3], argv[4]);
    }
    std::fprintf(stderr, "probe logits|quantize|tokens ...\n");
    return 1;
}
