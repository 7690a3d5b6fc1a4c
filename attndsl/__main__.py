from attndsl.cli import main

main(prog_name="attndsl")
