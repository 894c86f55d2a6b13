"""When robust reward models help under shift: see PROTOCOL.md."""
