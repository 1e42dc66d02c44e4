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

Vector cross(const double* a, const double* b) {
  return {a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]};
}

double dot(const double* a, const double* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }

ReferenceFrame read_frame(const Json& json, const std::vector<std::string>& elements) {
  ReferenceFrame frame;
  const auto& symbols = json.at("symbols").list();
  const size_t n = symbols.size();
  if (n == 0 || n > max_atoms) {
    throw Error("expected 1 to " + std::to_string(max_atoms) + " atoms in a frame, got " + std::to_string(n));
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
  frame.positions = rows("positions", n);
  frame.forces = rows("forces", n);
  frame.cell = rows("cell", 3);
  frame.virial = rows("virial", 3);
  json.at("energies").numbers(n);
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

/// Images to either side that are within reach along each vector of the cell, for atoms within `spread` of
/// one another.
std::array<int64_t, 3> images_of(const ReferenceFrame& frame, double cutoff) {
  std::array<int64_t, 3> count{};
  double total = 1.0;
  for (size_t d = 0; d < 3; ++d) {
    if (!frame.pbc[d]) continue;
    // an axis that is not periodic may have no vector: what matters is the height above the periodic ones
    std::vector<const double*> others;
    for (size_t k = 0; k < 3; ++k) {
      if (k != d && frame.pbc[k]) others.push_back(&frame.cell[3 * k]);
    }
    const double* a = &frame.cell[3 * d];
    double height = std::sqrt(dot(a, a));
    Vector normal{a[0], a[1], a[2]};
    if (others.size() == 2) {
      normal = cross(others[0], others[1]);
    } else if (others.size() == 1) {
      const double along = dot(a, others[0]) / dot(others[0], others[0]);
      for (size_t k = 0; k < 3; ++k) normal[k] -= along * others[0][k];
    }
    const double length = std::sqrt(dot(normal.data(), normal.data()));
    height = std::abs(dot(a, normal.data())) / length;
    double low = INFINITY, high = -INFINITY;
    for (size_t i = 0; i < frame.types.size(); ++i) {
      const double x = dot(&frame.positions[3 * i], normal.data()) / length;
      low = std::min(low, x), high = std::max(high, x);
    }
    const double reach = (cutoff + high - low) / height;
    total *= 2.0 * std::ceil(reach) + 1.0;
    if (!(total <= static_cast<double>(max_images))) {
      throw Error("expected a cell of the usual size in a frame, got one that is too flat");
    }
    count[d] = static_cast<int64_t>(std::ceil(reach));
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
  std::vector<size_t> order(frames.size()), chosen;
  std::iota(order.begin(), order.end(), size_t{0});
  // an atom of a crystal has more neighbours and angles than one of a cluster: a change shows more
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
  const auto n = static_cast<int64_t>(frames.size());
  std::pair<Array, Array> given;
  if (!pairs.empty()) given.first = Array::of(pairs, {n, 2});
  if (!numbers.empty()) given.second = Array::of(numbers, {n, static_cast<int64_t>(numbers.size()) / n});
  return given;
}

ListedEdges reference_list(const std::vector<const ReferenceFrame*>& frames, const GraphRules& rules) {
  const double cutoff = rules.cutoff, angle_cutoff = rules.angle_cutoff;
  size_t n_angle = 0;
  std::vector<int64_t> types, system, centre, neighbor;
  std::vector<double> vectors;
  for (size_t s = 0; s < frames.size(); ++s) {
    const ReferenceFrame& frame = *frames[s];
    const auto first = static_cast<int64_t>(types.size());
    const auto n = static_cast<int64_t>(frame.types.size());
    types.insert(types.end(), frame.types.begin(), frame.types.end());
    system.insert(system.end(), frame.types.size(), static_cast<int64_t>(s));
    const auto [n0, n1, n2] = images_of(frame, cutoff);
    const double steps = static_cast<double>(n * n) * static_cast<double>(2 * n0 + 1) *
                         static_cast<double>(2 * n1 + 1) * static_cast<double>(2 * n2 + 1);
    if (steps > max_steps) throw Error("expected frames of the usual size, got one with too many images");
    for (int64_t i = 0; i < n; ++i) {
      size_t n_close = 0;
      for (int64_t j = 0; j < n; ++j) {
        for (int64_t x = -n0; x <= n0; ++x) {
          for (int64_t y = -n1; y <= n1; ++y) {
            for (int64_t z = -n2; z <= n2; ++z) {
              if (i == j && x == 0 && y == 0 && z == 0) continue;
              Vector r{};
              for (size_t d = 0; d < 3; ++d) {
                r[d] = frame.positions[3 * static_cast<size_t>(j) + d] -
                       frame.positions[3 * static_cast<size_t>(i) + d] +
                       static_cast<double>(x) * frame.cell[d] + static_cast<double>(y) * frame.cell[3 + d] +
                       static_cast<double>(z) * frame.cell[6 + d];
              }
              const double r2 = dot(r.data(), r.data());
              if (!(r2 <= cutoff * cutoff)) continue;
              n_close += r2 < angle_cutoff * angle_cutoff ? 1 : 0;
              centre.push_back(first + i);
              neighbor.push_back(first + j);
              vectors.insert(vectors.end(), r.begin(), r.end());
              if (centre.size() > max_edges)
                throw Error("expected frames of the usual density, got a denser one");
            }
          }
        }
      }
      n_angle += n_close * n_close;
      if (n_angle > max_angles) throw Error("expected frames of the usual density, got a denser one");
    }
  }
  const auto n_edge = static_cast<int64_t>(centre.size());
  centre.insert(centre.end(), neighbor.begin(), neighbor.end());
  return list_of_edges(Array::of(types), Array::of(centre, {2, n_edge}), Array::of(vectors, {n_edge, 3}),
                       Array::of(system), static_cast<int64_t>(frames.size()));
}

void compare_with_reference(const std::vector<const ReferenceFrame*>& frames, const Evaluation& result,
                            double tolerance, const std::string& where) {
  const auto check = [&](const char* name, const char* unit, const double* got, const double* want, size_t n,
                         double per) {
    double deviation = 0.0, scale = 1.0;
    for (size_t k = 0; k < n; ++k) {
      const double d = std::abs(got[k] - want[k]) / per;
      // written so that NaN stays
      if (!(d <= deviation)) deviation = std::isnan(deviation) ? deviation : d;
      scale = std::max(scale, std::abs(want[k]) / per);
    }
    if (deviation <= tolerance * scale) return;
    throw Error(std::string(name) + " of the stored reference frame deviates by " + number(deviation) + " " +
                unit + " (allowed " + number(tolerance * scale) + ") " + where);
  };
  const auto* energy = result.energy.data<double>();
  const auto* forces = result.forces.data<double>();
  const auto* virial = result.virial.data<double>();
  for (size_t s = 0; s < frames.size(); ++s) {
    const ReferenceFrame& frame = *frames[s];
    const size_t n = frame.types.size();
    check("energy", "eV/atom", energy + s, &frame.energy, 1, static_cast<double>(n));
    check("forces", "eV/A", forces, frame.forces.data(), 3 * n, 1.0);
    check("virial", "eV", virial + 9 * s, frame.virial.data(), 9, 1.0);
    forces += 3 * n;
  }
}

}  // namespace moecalc
