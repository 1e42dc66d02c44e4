# What the projects of this folder have in common: language, flags, warnings.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
# Everything is installed in one folder, the Python package.
set(CMAKE_INSTALL_RPATH "$ORIGIN")
# No -march=native: a wheel must run on the machines of other people.
set(CMAKE_CXX_FLAGS_RELEASE "-O3 -DNDEBUG")
if(MOECALC_SANITIZE)
  # -O1 and short debug information: the same mistakes are found in half of the compile time. Types are not checked by
  # their vtable (vptr), because those of hidden classes differ between libraries.
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1 -fno-omit-frame-pointer -D_GLIBCXX_ASSERTIONS \
-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all")
endif()

# -Wno-restrict: false alarms in the strings of GCC 12 (its bug 105651).
set(MOECALC_WARNINGS -Wall -Wextra -Wno-psabi -Wno-restrict)
set(moecalc_cxx_warnings ${MOECALC_WARNINGS})
if(MOECALC_WERROR)
  list(APPEND moecalc_cxx_warnings -Werror)
endif()
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${moecalc_cxx_warnings}>")

# A symbol that another library forgot to export is an error here, not where somebody loads this one.
set(MOECALC_NO_UNDEFINED LINKER:-z,defs)
