from attndsl.command.cli import main

main(prog_name="attndsl")
