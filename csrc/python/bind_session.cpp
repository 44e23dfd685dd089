// Trees, drafters and sessions.
// SPDX-License-Identifier: Apache-2.0
#include <pybind11/trampoline_self_life_support.h>

#include <memory>
#include <utility>

#include "medusa/drafter.h"
#include "medusa/session.h"
#include "medusa/tree.h"
#include "python/bindings.h"

namespace medusa::python {
namespace {

// DraftInput as Python sees it: a copy, because Python may keep it longer than the call lasts.
struct DraftInputCopy {
  int64_t request;
  std::vector<int32_t> tokens;
  int max_nodes, max_depth;
  bool has_hidden;
};

using TreeLists = std::pair<std::vector<int64_t>, std::vector<int64_t>>;  // tokens, parents

void fill_tree(const TreeLists& lists, int max_nodes, DraftTree& tree) {
  const auto& [tokens, parents] = lists;
  MEDUSA_CHECK_ARG(tokens.size() == parents.size(), "Drafter.draft: ", tokens.size(),
                   " tokens and ", parents.size(), " parents; wanted as many");
  MEDUSA_CHECK_ARG(static_cast<int64_t>(tokens.size()) < max_nodes,
                   "Drafter.draft: ", tokens.size(), " nodes; at most ", max_nodes - 1,
                   " fit beside the root");
  const std::vector<int32_t> ids = token_ids(tokens);
  std::vector<int> node{0};  // of each entry; a duplicate sibling has its twin's
  for (size_t i = 0; i < ids.size(); ++i) {
    MEDUSA_CHECK_ARG(parents[i] >= 0 && parents[i] < static_cast<int64_t>(node.size()),
                     "Drafter.draft: parent ", parents[i], " of node ", node.size(),
                     "; wanted 0 (the root) to ", node.size() - 1);
    node.push_back(tree.add(node[static_cast<size_t>(parents[i])], ids[i]));
  }
}

// Runs a Python subclass. A Python exception travels through Session::step as
// py::error_already_set.
class PyDrafter : public Drafter, public py::trampoline_self_life_support {
 public:
  void draft(std::span<const DraftInput> inputs, std::span<DraftTree> trees) override {
    const py::gil_scoped_acquire lock;
    py::list copies;
    for (const DraftInput& input : inputs) {
      copies.append(DraftInputCopy{input.request,
                                   {input.tokens.begin(), input.tokens.end()},
                                   input.max_nodes,
                                   input.max_depth,
                                   input.hidden != nullptr});
    }
    const py::object answer = self().attr("draft")(copies);
    std::vector<TreeLists> lists;
    try {
      lists = answer.cast<std::vector<TreeLists>>();
    } catch (const py::cast_error&) {
      throw ArgumentError(concat("Drafter.draft: returned ", std::string(py::repr(answer)),
                                 "; wanted a list of (tokens, parents)"));
    }
    MEDUSA_CHECK_ARG(lists.size() == inputs.size(), "Drafter.draft: ", lists.size(), " trees for ",
                     inputs.size(), " inputs");
    for (size_t i = 0; i < lists.size(); ++i) fill_tree(lists[i], inputs[i].max_nodes, trees[i]);
  }

  int max_nodes() const override {
    const py::gil_scoped_acquire lock;
    return self().attr("max_nodes").cast<int>();
  }

  void on_finish(int64_t request) override {
    const py::gil_scoped_acquire lock;
    try {
      self().attr("on_finish")(request);
    } catch (py::error_already_set& error) {
      // The request is over whatever its drafter says, and nobody may be left to hear it.
      error.discard_as_unraisable("Drafter.on_finish");
    }
  }

 private:
  py::object self() const { return py::cast(static_cast<const Drafter*>(this)); }
};

const char* finish_name(Finish finish) {
  switch (finish) {
    case Finish::none:
      return nullptr;
    case Finish::stop:
      return "stop";
    case Finish::length:
      return "length";
    case Finish::cancelled:
      return "cancelled";
  }
  throw InternalError("Finish: unknown value");
}

SamplingParams make_sampling(float temperature, int top_k, double top_p, double min_p,
                             float repetition_penalty, const py::int_& seed, uint32_t sample_index,
                             const std::string& acceptance, double epsilon, double delta) {
  SamplingParams params{
      temperature,       top_k,   top_p, min_p, repetition_penalty, 0, sample_index,
      Acceptance::exact, epsilon, delta};
  params.seed = PyLong_AsUnsignedLongLong(seed.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw ArgumentError(concat("seed is ", std::string(py::str(seed)), "; wanted 0 to 2**64 - 1"));
  }
  MEDUSA_CHECK_ARG(acceptance == "exact" || acceptance == "typical", "acceptance is \"", acceptance,
                   "\"; wanted \"exact\" or \"typical\"");
  if (acceptance == "typical") params.acceptance = Acceptance::typical;
  params.check();
  return params;
}

void bind_trees_and_drafters(py::module_& m) {
  py::class_<TreeSpec>(m, "TreeSpec")
      .def_static("from_paths", &TreeSpec::from_paths, py::arg("paths"))
      .def_property_readonly("num_nodes", &TreeSpec::num_nodes)
      .def_property_readonly("depth", &TreeSpec::depth)
      .def("num_ranks", &TreeSpec::num_ranks, py::arg("depth"))
      .def("paths", &TreeSpec::paths)
      .def("parents",
           [](const TreeSpec& tree) {
             std::vector<int> parents;
             for (int v = 0; v < tree.num_nodes(); ++v) parents.push_back(tree.parent(v));
             return parents;
           })
      .def("depths", [](const TreeSpec& tree) {
        std::vector<int> depths;
        for (int v = 0; v < tree.num_nodes(); ++v) depths.push_back(tree.node_depth(v));
        return depths;
      });

  py::class_<DraftInputCopy>(m, "DraftInput")
      .def_readonly("request", &DraftInputCopy::request)
      .def_readonly("tokens", &DraftInputCopy::tokens)
      .def_readonly("max_nodes", &DraftInputCopy::max_nodes)
      .def_readonly("max_depth", &DraftInputCopy::max_depth)
      .def_readonly("has_hidden", &DraftInputCopy::has_hidden);

  // The defaults that a subclass overrides. They are never reached for a drafter written in C++.
  py::classh<Drafter, PyDrafter>(m, "Drafter")
      .def(py::init<>())
      .def_property_readonly("max_nodes",
                             [](const Drafter& self) {
                               if (dynamic_cast<const PyDrafter*>(&self) != nullptr) {
                                 throw UnsupportedError("Drafter: the subclass lacks max_nodes");
                               }
                               return self.max_nodes();
                             })
      .def(
          "draft",
          [](const Drafter&, const py::list&) -> std::vector<TreeLists> {
            throw UnsupportedError("Drafter.draft: only a subclass's own draft can be called");
          },
          py::arg("inputs"))
      .def("on_finish", [](const Drafter&, int64_t) {}, py::arg("request"));

  m.def(
      "medusa_drafter",
      [](const std::shared_ptr<Model>& model, const TreeSpec& tree) {
        return make_medusa_drafter(model, tree);
      },
      py::arg("model").none(false), py::arg("tree"), Release());
  const PromptLookupOptions lookup;
  m.def(
      "prompt_lookup_drafter",
      [](int max_ngram, int min_ngram, int max_nodes, int max_depth, int max_matches) {
        return make_prompt_lookup_drafter(
            {max_ngram, min_ngram, max_nodes, max_depth, max_matches});
      },
      py::kw_only(), py::arg("max_ngram") = lookup.max_ngram,
      py::arg("min_ngram") = lookup.min_ngram, py::arg("max_nodes") = lookup.max_nodes,
      py::arg("max_depth") = lookup.max_depth, py::arg("max_matches") = lookup.max_matches);
}

void bind_events(py::module_& m) {
  py::class_<RequestStats>(m, "RequestStats")
      .def_readonly("prompt_tokens", &RequestStats::prompt_tokens)
      .def_readonly("reused_tokens", &RequestStats::reused_tokens)
      .def_readonly("steps", &RequestStats::steps)
      .def_readonly("set_backs", &RequestStats::set_backs)
      .def_readonly("accepted_lengths", &RequestStats::accepted_lengths)
      .def_readonly("prefill_s", &RequestStats::prefill_s)
      .def_readonly("decode_s", &RequestStats::decode_s);

  py::class_<Event>(m, "Event")
      .def_readonly("request", &Event::request)
      .def_readonly("tokens", &Event::tokens)
      .def_property_readonly("finish", [](const Event& event) { return finish_name(event.finish); })
      .def_readonly("stats", &Event::stats);

  py::class_<SessionStats>(m, "SessionStats")
      .def_readonly("active", &SessionStats::active)
      .def_readonly("waiting", &SessionStats::waiting)
      .def_readonly("pages_used", &SessionStats::pages_used)
      .def_readonly("pages_total", &SessionStats::pages_total)
      .def_readonly("pages_cached", &SessionStats::pages_cached)
      .def_readonly("steps", &SessionStats::steps)
      .def_readonly("device_steps", &SessionStats::device_steps)
      .def_readonly("device_step_s", &SessionStats::device_step_s)
      .def_readonly("device_gap_s", &SessionStats::device_gap_s)
      .def_readonly("set_backs", &SessionStats::set_backs)
      .def_readonly("compactions_across_pages", &SessionStats::compactions_across_pages)
      .def_readonly("weight_bytes", &SessionStats::weight_bytes)
      .def_readonly("cache_bytes", &SessionStats::cache_bytes)
      .def_readonly("workspace_bytes", &SessionStats::workspace_bytes);
}

}  // namespace

void bind_session(py::module_& m) {
  bind_trees_and_drafters(m);
  bind_events(m);

  const SamplingParams plain;
  py::class_<SamplingParams>(m, "SamplingParams")
      .def(py::init(&make_sampling), py::kw_only(), py::arg("temperature") = plain.temperature,
           py::arg("top_k") = plain.top_k, py::arg("top_p") = plain.top_p,
           py::arg("min_p") = plain.min_p, py::arg("repetition_penalty") = plain.repetition_penalty,
           py::arg("seed") = plain.seed, py::arg("sample_index") = plain.sample_index,
           py::arg("acceptance") = "exact", py::arg("epsilon") = plain.epsilon,
           py::arg("delta") = plain.delta);

  // Every method drops the interpreter lock first: a step may hold the session's own lock while a
  // Python drafter waits for the interpreter's.
  const SessionOptions options;
  py::class_<Session>(m, "Session")
      .def(py::init([](const std::shared_ptr<Model>& model, const std::shared_ptr<Drafter>& drafter,
                       int max_batch, int max_context, int64_t cache_tokens, int prefill_chunk) {
             return std::make_unique<Session>(
                 model, drafter,
                 SessionOptions{max_batch, max_context, cache_tokens, prefill_chunk});
           }),
           py::arg("model"), py::arg("drafter").none(true), py::kw_only(),
           py::arg("max_batch") = options.max_batch, py::arg("max_context") = options.max_context,
           py::arg("cache_tokens") = options.cache_tokens,
           py::arg("prefill_chunk") = options.prefill_chunk, Release())
      .def_property_readonly("max_context",
                             [](const Session& session) { return session.options().max_context; })
      .def(
          "submit",
          [](Session& session, const std::vector<int64_t>& tokens, int max_new_tokens,
             const SamplingParams* sampling, const std::vector<int64_t>& eos_ids,
             bool reuse_prefix) {
            return session.submit({token_ids(tokens), max_new_tokens,
                                   sampling != nullptr ? *sampling : SamplingParams{},
                                   token_ids(eos_ids), reuse_prefix});
          },
          py::arg("tokens"), py::kw_only(), py::arg("max_new_tokens") = 0,
          py::arg("sampling") = py::none(), py::arg("eos_ids") = py::tuple(),
          py::arg("reuse_prefix") = true, Release())
      .def("step", &Session::step, Release())
      .def("cancel", &Session::cancel, py::arg("request"), Release())
      .def_property_readonly("idle", py::cpp_function(&Session::idle, Release()))
      .def("stats", &Session::stats, Release());
}

}  // namespace medusa::python
