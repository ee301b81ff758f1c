# cmake -DNM=nm -DSET=avx2 -DOBJECTS="a.o;b.o" -P set_isolation.cmake
#
# Fails if an object of an instruction set defines a function that other objects may define too (a weak symbol: an inline
# function or template instance that was not inlined) and that does not carry the set's name: the linker could give it to
# code that must run without the set. Weak data is the same wherever it comes from.
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --demangle --defined-only ${object} OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REPLACE "\n" ";" symbols "${symbols}")
  foreach(symbol IN LISTS symbols)
    if(symbol MATCHES "^[0-9a-f]+ W " AND NOT symbol MATCHES "qlora::${SET}::" AND NOT symbol MATCHES "DW\\.ref\\.")
      message(SEND_ERROR "${object} shares ${symbol}")
    endif()
  endforeach()
endforeach()
