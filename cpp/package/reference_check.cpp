#include "package/reference_check.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <set>
#include <utility>

#include "core/json.h"
#include "moecalc/error.h"
#include "moecalc/text.h"

namespace moecalc {

namespace {

constexpr size_t max_atoms = 4096;       // of one frame; a few tens are usual
constexpr int64_t max_images = 1 << 16;  // of one atom
constexpr size_t max_edges = 1 << 22;
constexpr size_t max_angles = 1 << 24;
constexpr double max_steps = 1e9;  // distances that are looked at in a frame: seconds

using Vector = std::array<double, 3>;

Vector cross(const double* left, const double* right) {
  return {left[1] * right[2] - left[2] * right[1], left[2] * right[0] - left[0] * right[2],
          left[0] * right[1] - left[1] * right[0]};
}

double dot(const double* left, const double* right) {
  return left[0] * right[0] + left[1] * right[1] + left[2] * right[2];
}

ReferenceFrame read_frame(const Json& json, const std::vector<std::string>& elements) {
  ReferenceFrame frame;
  const auto& symbols = json.at("symbols").list();
  const size_t n_atom = symbols.size();
  if (n_atom == 0 || n_atom > max_atoms) {
    throw Error("expected 1 to " + std::to_string(max_atoms) + " atoms in a frame, got " +
                std::to_string(n_atom));
  }
  for (const Json& symbol : symbols) {
    const auto found = std::find(elements.begin(), elements.end(), symbol.text());
    if (found == elements.end()) {
      throw Error("expected elements of the package in a frame, got '" + printable(symbol.text(), 20) + "'");
    }
    frame.types.push_back(found - elements.begin());
  }
  const auto rows = [&](const char* name, size_t n_rows) {
    const auto& list = json.at(name).list();
    if (list.size() != n_rows) {
      throw Error(std::string("expected ") + std::to_string(n_rows) + " rows of `" + name + "`, got " +
                  std::to_string(list.size()));
    }
    std::vector<double> values;
    for (const Json& row : list) {
      const std::vector<double> three = row.numbers(3);
      values.insert(values.end(), three.begin(), three.end());
    }
    return values;
  };
  frame.positions = rows("positions", n_atom);
  frame.forces = rows("forces", n_atom);
  frame.cell = rows("cell", 3);
  frame.virial = rows("virial", 3);
  json.at("energies").numbers(n_atom);
  frame.energy = json.at("energy").number();
  const auto& pbc = json.at("pbc").list();
  if (pbc.size() != 3) throw Error("expected 3 entries of `pbc`, got " + std::to_string(pbc.size()));
  for (size_t d = 0; d < 3; ++d) frame.pbc[d] = pbc[d].boolean();
  const auto given = [&](const char* name) {
    return json.has(name) && json.at(name).kind() != Json::Kind::null;
  };
  if (given("charge") != given("spin")) throw Error("expected both `charge` and `spin` of a frame, or none");
  for (const char* name : {"charge", "spin"}) {
    if (!given(name)) continue;
    const double value = json.at(name).number();
    if (std::abs(value) > 100.0 || value != std::floor(value)) {
      throw Error(std::string("expected a whole `") + name + "` up to 100, got " + std::to_string(value));
    }
    frame.charge_spin.push_back(static_cast<int64_t>(value));
  }
  if (given("fparam")) frame.fparam = json.at("fparam").numbers(json.at("fparam").list().size());
  return frame;
}

/// Distance of the cell's faces along vector `axis`, and a `normal` to them. An axis that is
/// not periodic may have no vector: what matters is the height above the periodic ones.
double height_of_cell(const ReferenceFrame& frame, size_t axis, Vector& normal) {
  std::vector<const double*> others;
  for (size_t k = 0; k < 3; ++k) {
    if (k != axis && frame.pbc[k]) others.push_back(&frame.cell[3 * k]);
  }
  const double* vector = &frame.cell[3 * axis];
  normal = {vector[0], vector[1], vector[2]};
  if (others.size() == 2) {
    normal = cross(others[0], others[1]);
  } else if (others.size() == 1) {
    const double along = dot(vector, others[0]) / dot(others[0], others[0]);
    for (size_t k = 0; k < 3; ++k) normal[k] -= along * others[0][k];
  }
  const double length = std::sqrt(dot(normal.data(), normal.data()));
  return std::abs(dot(vector, normal.data())) / length;
}

/// Images to either side that are within reach along each vector of the cell, for the spread of
/// the atoms.
std::array<int64_t, 3> images_of(const ReferenceFrame& frame, double cutoff) {
  std::array<int64_t, 3> count{};
  double total = 1.0;
  for (size_t axis = 0; axis < 3; ++axis) {
    if (!frame.pbc[axis]) continue;
    Vector normal{};
    const double height = height_of_cell(frame, axis, normal);
    const double length = std::sqrt(dot(normal.data(), normal.data()));
    double low = INFINITY;
    double high = -INFINITY;
    for (size_t i = 0; i < frame.types.size(); ++i) {
      const double along = dot(&frame.positions[3 * i], normal.data()) / length;
      low = std::min(low, along);
      high = std::max(high, along);
    }
    const double reach = (cutoff + high - low) / height;
    total *= 2.0 * std::ceil(reach) + 1.0;
    if (!(total <= static_cast<double>(max_images))) {
      throw Error("expected a cell of the usual size in a frame, got one that is too flat");
    }
    count[axis] = static_cast<int64_t>(std::ceil(reach));
  }
  return count;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.2g", value);
  return text;
}

}  // namespace

std::vector<ReferenceFrame> read_reference(const std::string& text,
                                           const std::vector<std::string>& elements) {
  std::vector<ReferenceFrame> frames;
  try {
    const Json stored = Json::parse(text);
    for (const Json& json : stored.list()) frames.push_back(read_frame(json, elements));
  } catch (const Error& error) {
    throw Error(std::string("reference.json: ") + error.what() + ": package the checkpoint again");
  }
  if (frames.empty()) {
    throw Error("expected reference frames, got none: package the checkpoint again");
  }
  return frames;
}

std::vector<size_t> covering_frames(const std::vector<ReferenceFrame>& frames, std::vector<bool> wanted) {
  std::vector<size_t> order(frames.size());
  std::vector<size_t> chosen;
  std::iota(order.begin(), order.end(), size_t{0});
  // an atom of a crystal has more neighbors and angles than one of a cluster: a change shows more
  const auto rank = [&](size_t k) {
    const ReferenceFrame& frame = frames[k];
    return std::pair(frame.pbc[0] && frame.pbc[1] && frame.pbc[2], frame.types.size());
  };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return rank(a) > rank(b); });
  for (const size_t k : order) {
    bool adds = chosen.empty();  // an isolated atom would test little
    for (const int64_t type : frames[k].types) {
      adds = adds || wanted[static_cast<size_t>(type)];
      wanted[static_cast<size_t>(type)] = false;
    }
    if (adds) chosen.push_back(k);
  }
  return chosen;
}

size_t cheapest_frame(const std::vector<ReferenceFrame>& frames) {
  const auto cost = [](const ReferenceFrame& frame) {
    const std::set<int64_t> elements(frame.types.begin(), frame.types.end());
    return std::pair(frame.types.size() < 2, elements.size());
  };
  const auto found = std::min_element(frames.begin(), frames.end(),
                                      [&](const auto& a, const auto& b) { return cost(a) < cost(b); });
  return static_cast<size_t>(found - frames.begin());
}

std::pair<Array, Array> conditions_of_frames(const std::vector<const ReferenceFrame*>& frames) {
  std::vector<int64_t> pairs;
  std::vector<double> numbers;
  for (const ReferenceFrame* frame : frames) {
    if (frame->charge_spin.size() != frames[0]->charge_spin.size() ||
        frame->fparam.size() != frames[0]->fparam.size()) {
      throw Error(
          "expected reference frames that all have charge, spin and frame parameters, or none of them");
    }
    pairs.insert(pairs.end(), frame->charge_spin.begin(), frame->charge_spin.end());
    numbers.insert(numbers.end(), frame->fparam.begin(), frame->fparam.end());
  }
  const auto n_frame = static_cast<int64_t>(frames.size());
  const auto n_number = static_cast<int64_t>(numbers.size());
  std::pair<Array, Array> given;
  if (!pairs.empty()) given.first = Array::of(pairs, {n_frame, 2});
  if (!numbers.empty()) given.second = Array::of(numbers, {n_frame, n_number / n_frame});
  return given;
}

namespace {

/// The edges of frames, one frame behind the other.
class EdgeCollector {
 public:
  explicit EdgeCollector(const GraphRules& rules)
      : cutoff_(rules.cutoff), angle_cutoff_(rules.angle_cutoff) {}

  void add(const ReferenceFrame& frame, int64_t system) {
    const auto first = static_cast<int64_t>(types_.size());
    const auto n_atom = static_cast<int64_t>(frame.types.size());
    types_.insert(types_.end(), frame.types.begin(), frame.types.end());
    system_.insert(system_.end(), frame.types.size(), system);
    const std::array<int64_t, 3> images = images_of(frame, cutoff_);
    double steps = static_cast<double>(n_atom * n_atom);
    for (const int64_t count : images) steps *= static_cast<double>(2 * count + 1);
    if (steps > max_steps) throw Error("expected frames of the usual size, got one with too many images");
    for (int64_t i = 0; i < n_atom; ++i) {
      n_close_ = 0;
      for (int64_t j = 0; j < n_atom; ++j) add_pair(frame, images, first, i, j);
      n_angle_ += n_close_ * n_close_;
      if (n_angle_ > max_angles) throw Error("expected frames of the usual density, got a denser one");
    }
  }

  ListedEdges list(int64_t n_systems) {
    const auto n_edge = static_cast<int64_t>(centre_.size());
    centre_.insert(centre_.end(), neighbor_.begin(), neighbor_.end());
    return list_of_edges(Array::of(types_), Array::of(centre_, {2, n_edge}), Array::of(vectors_, {n_edge, 3}),
                         Array::of(system_), n_systems);
  }

 private:
  /// All images of atom j around atom i.
  void add_pair(const ReferenceFrame& frame, const std::array<int64_t, 3>& images, int64_t first, int64_t i,
                int64_t j) {
    std::array<int64_t, 3> image{};
    for (image[0] = -images[0]; image[0] <= images[0]; ++image[0]) {
      for (image[1] = -images[1]; image[1] <= images[1]; ++image[1]) {
        for (image[2] = -images[2]; image[2] <= images[2]; ++image[2]) {
          if (i == j && image == std::array<int64_t, 3>{}) continue;
          add_edge(frame, image, first, i, j);
        }
      }
    }
  }

  void add_edge(const ReferenceFrame& frame, const std::array<int64_t, 3>& image, int64_t first, int64_t i,
                int64_t j) {
    Vector vector{};
    for (size_t c = 0; c < 3; ++c) {
      vector[c] =
          frame.positions[3 * static_cast<size_t>(j) + c] - frame.positions[3 * static_cast<size_t>(i) + c] +
          static_cast<double>(image[0]) * frame.cell[c] + static_cast<double>(image[1]) * frame.cell[3 + c] +
          static_cast<double>(image[2]) * frame.cell[6 + c];
    }
    const double square = dot(vector.data(), vector.data());
    if (!(square <= cutoff_ * cutoff_)) return;
    n_close_ += square < angle_cutoff_ * angle_cutoff_ ? 1 : 0;
    centre_.push_back(first + i);
    neighbor_.push_back(first + j);
    vectors_.insert(vectors_.end(), vector.begin(), vector.end());
    if (centre_.size() > max_edges) throw Error("expected frames of the usual density, got a denser one");
  }

  const double cutoff_;
  const double angle_cutoff_;
  size_t n_angle_ = 0;
  size_t n_close_ = 0;  // of one centre
  std::vector<int64_t> types_;
  std::vector<int64_t> system_;
  std::vector<int64_t> centre_;
  std::vector<int64_t> neighbor_;
  std::vector<double> vectors_;
};

}  // namespace

ListedEdges reference_list(const std::vector<const ReferenceFrame*>& frames, const GraphRules& rules) {
  EdgeCollector edges(rules);
  for (size_t index = 0; index < frames.size(); ++index) {
    edges.add(*frames[index], static_cast<int64_t>(index));
  }
  return edges.list(static_cast<int64_t>(frames.size()));
}

namespace {

/// Throws Error unless `count` numbers agree, each divided by `per`.
struct Comparison {
  double tolerance;
  const std::string& where;

  void check(const char* name, const char* unit, const double* got, const double* want, size_t count,
             double per) const {
    double deviation = 0.0;
    double scale = 1.0;
    for (size_t k = 0; k < count; ++k) {
      const double difference = std::abs(got[k] - want[k]) / per;
      // written so that NaN stays
      if (!(difference <= deviation)) deviation = std::isnan(deviation) ? deviation : difference;
      scale = std::max(scale, std::abs(want[k]) / per);
    }
    if (deviation <= tolerance * scale) return;
    throw Error(std::string(name) + " of the stored reference frame deviates by " + number(deviation) + " " +
                unit + " (allowed " + number(tolerance * scale) + ") " + where);
  }
};

}  // namespace

void compare_with_reference(const std::vector<const ReferenceFrame*>& frames, const Evaluation& result,
                            double tolerance, const std::string& where) {
  const Comparison comparison{tolerance, where};
  const auto* energy = result.energy.data<double>();
  const auto* forces = result.forces.data<double>();
  const auto* virial = result.virial.data<double>();
  for (const ReferenceFrame* frame : frames) {
    const size_t n_atom = frame->types.size();
    comparison.check("energy", "eV/atom", energy, &frame->energy, 1, static_cast<double>(n_atom));
    comparison.check("forces", "eV/A", forces, frame->forces.data(), 3 * n_atom, 1.0);
    comparison.check("virial", "eV", virial, frame->virial.data(), 9, 1.0);
    energy += 1;
    forces += 3 * n_atom;
    virial += 9;
  }
}

}  // namespace moecalc
