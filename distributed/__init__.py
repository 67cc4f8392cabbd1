"""Distributed training of AlexNet variants on CIFAR: one recipe, any launcher, the same bits after every kill."""
