/* Streams through an exported model without Python: TF_LoadSessionFromSavedModel and the signatures `init_state` and
 * `step`, every state output fed back to the input of the same name.
 *
 *   load EXPORT PLAN > OUTPUTS
 *
 * PLAN is text, written by load_c.py from the signatures in saved_model.pb (tensor names need no protobuf here):
 *   rows B
 *   batch_size OP INDEX                    input of init_state
 *   token_ids OP INDEX                     inputs of step
 *   lengths OP INDEX
 *   logits OP INDEX                        output of step
 *   states COUNT, then per leaf: INIT_OP INDEX STEP_IN_OP INDEX STEP_OUT_OP INDEX
 *   chunks COUNT, then per chunk: T, then B lengths, then B * T token ids
 * Outputs are one number a line, the logits [B, T, V] of all chunks in order.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tensorflow/c/c_api.h>

#define NAME 256

static TF_Graph* graph;
static TF_Session* session;
static TF_Status* status;

static void check(int fine, const char* what) {
  if (fine) return;
  fprintf(stderr, "%s: %s\n", what, TF_GetCode(status) == TF_OK ? "unexpected plan" : TF_Message(status));
  exit(1);
}

static TF_Output endpoint(FILE* plan) {
  char name[NAME];
  TF_Output output;
  check(fscanf(plan, "%255s %d", name, &output.index) == 2, "endpoint");
  output.oper = TF_GraphOperationByName(graph, name);
  check(output.oper != NULL, name);
  return output;
}

static void expect(FILE* plan, const char* word) {
  char seen[NAME];
  check(fscanf(plan, "%255s", seen) == 1 && !strcmp(seen, word), word);
}

static int number(FILE* plan) {
  int value;
  check(fscanf(plan, "%d", &value) == 1, "number");
  return value;
}

static TF_Tensor* int_tensor(FILE* plan, const int64_t* shape, int rank) {
  int64_t count = 1;
  for (int i = 0; i < rank; i++) count *= shape[i];
  TF_Tensor* tensor = TF_AllocateTensor(TF_INT32, shape, rank, count * sizeof(int32_t));
  int32_t* data = TF_TensorData(tensor);
  for (int64_t i = 0; i < count; i++) data[i] = number(plan);
  return tensor;
}

int main(int argc, char** argv) {
  if (argc != 3) return fprintf(stderr, "usage: load EXPORT PLAN\n"), 2;
  status = TF_NewStatus();
  graph = TF_NewGraph();
  TF_SessionOptions* options = TF_NewSessionOptions();
  const char* tags[] = {"serve"};
  session = TF_LoadSessionFromSavedModel(options, NULL, argv[1], tags, 1, graph, NULL, status);
  check(TF_GetCode(status) == TF_OK, argv[1]);

  FILE* plan = fopen(argv[2], "r");
  check(plan != NULL, argv[2]);
  expect(plan, "rows");
  int32_t rows = number(plan);
  expect(plan, "batch_size");
  TF_Output batch_size = endpoint(plan);
  expect(plan, "token_ids");
  TF_Output token_ids = endpoint(plan);
  expect(plan, "lengths");
  TF_Output lengths = endpoint(plan);
  expect(plan, "logits");
  TF_Output logits = endpoint(plan);
  expect(plan, "states");
  int leaves = number(plan);
  /* Inputs of step: token ids, lengths, then the state; outputs: logits, then the state. */
  TF_Output* init_out = calloc(leaves, sizeof(TF_Output));
  TF_Output* step_in = calloc(leaves + 2, sizeof(TF_Output));
  TF_Output* step_out = calloc(leaves + 1, sizeof(TF_Output));
  TF_Tensor** given = calloc(leaves + 2, sizeof(TF_Tensor*));
  TF_Tensor** found = calloc(leaves + 1, sizeof(TF_Tensor*));
  step_in[0] = token_ids, step_in[1] = lengths, step_out[0] = logits;
  for (int i = 0; i < leaves; i++) {
    init_out[i] = endpoint(plan);
    step_in[i + 2] = endpoint(plan);
    step_out[i + 1] = endpoint(plan);
  }

  TF_Tensor* count = TF_AllocateTensor(TF_INT32, NULL, 0, sizeof(int32_t));
  memcpy(TF_TensorData(count), &rows, sizeof(rows));
  TF_SessionRun(session, NULL, &batch_size, &count, 1, init_out, given + 2, leaves, NULL, 0, NULL, status);
  check(TF_GetCode(status) == TF_OK, "init_state");
  TF_DeleteTensor(count);

  expect(plan, "chunks");
  for (int left = number(plan); left > 0; left--) {
    int64_t shape[2] = {rows, number(plan)};
    given[1] = int_tensor(plan, shape, 1);
    given[0] = int_tensor(plan, shape, 2);
    TF_SessionRun(session, NULL, step_in, given, leaves + 2, step_out, found, leaves + 1, NULL, 0, NULL, status);
    check(TF_GetCode(status) == TF_OK, "step");
    const float* values = TF_TensorData(found[0]);
    for (size_t i = 0; i < TF_TensorByteSize(found[0]) / sizeof(float); i++) printf("%.9g\n", values[i]);
    TF_DeleteTensor(found[0]);
    for (int i = 0; i < leaves + 2; i++) TF_DeleteTensor(given[i]);
    memcpy(given + 2, found + 1, leaves * sizeof(TF_Tensor*));
  }

  for (int i = 0; i < leaves; i++) TF_DeleteTensor(given[i + 2]);
  free(init_out), free(step_in), free(step_out), free(given), free(found);
  fclose(plan);
  TF_CloseSession(session, status);
  TF_DeleteSession(session, status);
  TF_DeleteSessionOptions(options);
  TF_DeleteGraph(graph);
  TF_DeleteStatus(status);
  return 0;
}
