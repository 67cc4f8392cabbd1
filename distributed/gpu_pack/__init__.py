"""What a machine with a GPU and no network needs: wheels, CIFAR-10 and two commands; what it gives back."""
