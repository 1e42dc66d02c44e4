// What torch would make of a package's pickles, found out before torch reads them.
#pragma once

#include <string>
#include <string_view>

#include "moecalc/package_file.h"

namespace moecalc {

/// Goes through the pickle in record `name` and throws Error, without the name of the file, unless it holds
/// nothing but modules of moecalc with numbers, strings, lists of these and tensors. Tensors lie within their
/// storages (record `folder`/N), which have the size that the pickle says; torch does not look at that.
void check_pickle(const PackageFile& file, const std::string& name, const std::string& folder);

/// Whether a class or function of this qualified name (`__torch__.moecalc.nn.moe.RowExperts`) may be in a
/// package.
bool is_known_code(std::string_view qualified_name);

}  // namespace moecalc
