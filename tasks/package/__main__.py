from tasks.core.shell import main
from tasks.package import stage

main(stage)
